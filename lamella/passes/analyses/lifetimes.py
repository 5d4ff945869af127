"""When values are alive: the estimate of the memory that activations take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rules.cost_elementwise import VIEWS
from lamella.rules.work import Call, Expr


@dataclass(frozen=True)
class Lifetimes:
    """The values of a graph that have memory of their own.

    Attributes:
        spans: Step at which it is computed, step at which it is read last, bytes.
    """

    spans: tuple[tuple[int, int, Expr], ...]

    def peak_bytes(self, number: Callable[[Expr], int]) -> int:
        """The most bytes that are alive at one step.

        Args:
            number: The value of an expression at the sizes that are asked for.
        """
        changes: dict[int, int] = {}
        for start, stop, size in self.spans:
            nbytes = number(size)
            changes[start] = changes.get(start, 0) + nbytes
            changes[stop + 1] = changes.get(stop + 1, 0) - nbytes
        alive = peak = 0
        for step in sorted(changes):
            alive += changes[step]
            peak = max(peak, alive)
        return peak


def lifetimes_of(graph: Graph, names: Mapping[sympy.Symbol, sympy.Symbol]) -> Lifetimes:
    """The spans of all values; a view belongs to the value it looks at."""
    owner: dict[Node, Node] = {}
    last: dict[Node, int] = {}
    start: dict[Node, int] = {}
    for step, node in enumerate(graph.nodes):
        if node.op == "get_attr":
            continue
        start[node] = step
        operands = [operand for operand in node.all_input_nodes if operand.op != "get_attr"]
        viewed = node.op == "call_function" and node.target in VIEWS and operands
        owner[node] = owner[operands[0]] if viewed else node
        for operand in (*operands, node):
            last[owner[operand]] = step
    spans = [
        (start[node], step, Call(node, names).written_bytes())
        for node, step in last.items()
        if node.op != "output"
    ]
    return Lifetimes(tuple(spans))
