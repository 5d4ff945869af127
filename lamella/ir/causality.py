"""Whether an attention mask hides the future: found by computing the mask once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from lamella.ir.graph import Graph
from lamella.ir.ops import facts
from lamella.ir.symbols import shape_of

_HIDDEN = -1e4


class Causality:
    """Which masks of a graph hide the future; each mask is computed once.

    Inputs are ones at the sizes of the capture. Weights that are not in memory count as zeros:
    a learned bias doesn't decide what is hidden.
    """

    def __init__(self, graph: Graph) -> None:
        """Answers for the masks of `graph`."""
        self._graph = graph
        self._known: dict[Node, bool] = {}

    def hides_future(self, mask: Any) -> bool:
        """Whether no query sees a later key.

        Args:
            mask: Boolean (True is seen) or added to the scores, ``[..., queries, keys]``; what
                is no square mask of a self-attention, or comes out of a contraction, hides
                nothing.
        """
        if not isinstance(mask, Node) or not _is_square(mask):
            return False
        if mask not in self._known:
            needed = _ancestors(mask)
            contracts = any(_category(node) in ("contraction", "attention") for node in needed)
            self._known[mask] = not contracts and _hides_the_future(
                _computed(self._graph, mask, needed)
            )
        return self._known[mask]


def _category(node: Node) -> str:
    found = facts(node.target)
    return found.category if found is not None else ""


def _is_square(mask: Node) -> bool:
    sizes = shape_of(mask)
    return len(sizes) >= 2 and sizes[-1] == sizes[-2] and sizes[-1] != 1


def _hides_the_future(mask: Tensor) -> bool:
    hidden = ~mask if mask.dtype == torch.bool else mask <= _HIDDEN
    size = mask.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool).triu(1)
    return _covers_future(hidden, future) or (
        # A boolean mask may also be True for what is hidden.
        mask.dtype == torch.bool and _covers_future(~hidden, future)
    )


def _covers_future(hidden: Tensor, future: Tensor) -> bool:
    """Whether all of the future is hidden, and a token itself is not."""
    seen = hidden.diagonal(dim1=-2, dim2=-1)
    return hidden.shape[-1] > 1 and bool(hidden[..., future].all()) and not bool(seen.any())


def _computed(graph: Graph, mask: Node, needed: set[Node]) -> Tensor:
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node not in needed:
                continue
            if node.op == "placeholder":
                values[node] = _ones(node.meta["val"])
            elif node.op == "get_attr":
                values[node] = _weight(graph, node)
            else:
                args: Any = map_arg(node.args, values.__getitem__)
                kwargs: Any = map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    return values[mask]


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo.extend(one.all_input_nodes)
    return found


def _weight(graph: Graph, node: Node) -> Tensor:
    if graph.is_loaded(node):
        return graph.weight(node)
    value = node.meta["val"]
    return torch.zeros(tuple(value.shape), dtype=value.dtype)


def _ones(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.ones(tuple(_sample_size(size) for size in value.shape), dtype=value.dtype)


def _sample_size(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 4
    return int(size)
