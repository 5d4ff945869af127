"""The integers of a graph whose sequence grows: of the new tokens, of the past, of both."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import Node

from lamella.errors import IncrementalError
from lamella.ir.graph import Graph
from lamella.ir.symbols import shape_of, size_of

aten = torch.ops.aten


class Lengths:
    """The three lengths as nodes, and every integer of the graph computed from the right one.

    Attributes:
        new: The number of new tokens.
        total: The number of tokens, past and new.
        past: The difference.
    """

    def __init__(self, graph: Graph, tokens: Node, mask: Node) -> None:
        """Add the nodes at the top of `graph`; `mask` is as long as past and new tokens."""
        self._graph = graph
        self._length: Any = shape_of(tokens)[1]
        last = graph.inputs[-1]
        self.total = graph.call(aten.sym_size.int, mask, 1, after=last)
        self.new = graph.call(aten.sym_size.int, tokens, 1, after=last)
        self.past = graph.call(operator.sub, self.total, self.new, after=self.total)
        self._totals: dict[Node, Node] = {self.new: self.total}

    def use_total(self, node: Node) -> None:
        """Let a value of the whole sequence read the total where it read the length."""
        for source in node.all_input_nodes:
            if self._depends(source):
                self._graph.reread(node, source, self._total(source))

    def use_new(self, node: Node) -> None:
        """Let a value of the new tokens, or an integer, read how many they are."""
        if node.target is aten.sym_size.int and node not in (self.new, self.total):
            expression = size_of(node.meta["val"])
            if expression == self._length:
                self._graph.replace(node, self.new)
            elif self._depends(node):
                raise IncrementalError(
                    f"{node.name} is {expression}, a length that can't be told from those of the "
                    f"new tokens and the past"
                )

    def _depends(self, source: Node) -> bool:
        value = source.meta.get("val")
        if not isinstance(value, torch.SymInt) or source in (self.total, self.past):
            return False
        expression = size_of(value)
        return isinstance(expression, sympy.Expr) and expression.has(self._length)

    def _total(self, source: Node) -> Node:
        """The integer `source` for the whole sequence instead of the new tokens."""
        if source not in self._totals:
            if source.target is aten.sym_size.int:
                self._totals[source] = self.total
            else:
                args = [
                    self._total(a) if isinstance(a, Node) and self._depends(a) else a
                    for a in source.args
                ]
                assert callable(source.target)
                self._totals[source] = self._graph.call(source.target, *args, after=source)
        return self._totals[source]
