"""Values of a graph at given numbers of new and past tokens, without running the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from lamella.ir.graph import Graph
from lamella.ir.symbols import shape_of


@dataclass(frozen=True)
class Evaluation:
    """Computes values that depend on lengths and masks alone.

    Attributes:
        graph: Whose values they are.
        tokens: Its input of tokens.
        mask: Its input of the mask.
    """

    graph: Graph
    tokens: Node
    mask: Node

    def at(self, node: Node, new: int, past: int, mask: Tensor) -> Tensor:
        """`node` for a batch with `new` tokens after `past` ones.

        Args:
            node: What to compute; it reads no token.
            new: New tokens.
            past: Tokens before them.
            mask: ``[batch, past + new]``, 1 for what may be seen.
        """
        values: dict[Node, Any] = {
            self.tokens: torch.zeros(mask.shape[0], new, dtype=torch.int64),
            self.mask: mask,
        }
        needed = _ancestors(node, stop=set(values))
        with torch.no_grad():
            for one in self.graph.nodes:
                if one in needed and one not in values:
                    values[one] = self._value(one, values, mask.shape[0], past + new)
        return values[node]

    def _value(self, node: Node, values: dict[Node, Any], batch: int, total: int) -> Any:
        if node.op == "get_attr":
            return self._weight(node)
        if node.op == "placeholder":
            return self._example(node, batch, total)
        args: Any = map_arg(node.args, values.__getitem__)
        kwargs: Any = map_arg(node.kwargs, values.__getitem__)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _weight(self, node: Node) -> Tensor:
        if self.graph.is_loaded(node):
            return self.graph.weight(node)
        # What a learned bias adds doesn't decide what is hidden.
        value = node.meta["val"]
        return torch.zeros(tuple(value.shape), dtype=value.dtype)

    def _example(self, node: Node, batch: int, total: int) -> Tensor:
        first, *rest = shape_of(node)
        sizes = [batch if not isinstance(first, int) else first]
        sizes += [total if not isinstance(size, int) else size for size in rest]
        return torch.ones(sizes, dtype=node.meta["val"].dtype)


def _ancestors(node: Node, stop: set[Node]) -> set[Node]:
    found: set[Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            if one not in stop:
                todo.extend(one.all_input_nodes)
    return found
