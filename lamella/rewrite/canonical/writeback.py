"""What a tensor becomes when a view of it is overwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import LAST, axis_of, shape_of, size_arguments

aten = torch.ops.aten


def part_put_back(graph: Graph, whole: Node, view: Node, new: Node, before: Node) -> Node | None:
    """`whole` with the part that `view` shows replaced by `new`; None if that can't be said.

    The nodes are placed before `before`.
    """
    name = str(view.target).split(".")[1]
    if name in _SAME:
        return new
    put = _PUT.get(name)
    return None if put is None else put(graph, whole, view, new, before)


_SAME = frozenset({"alias", "detach", "to", "contiguous"})


def _reshape(graph: Graph, whole: Node, view: Node, new: Node, before: Node) -> Node | None:
    size = size_arguments(graph, shape_of(whole), [whole], before)
    return graph.call(aten.reshape.default, new, size, before=before, like=whole)


def _transpose(graph: Graph, whole: Node, view: Node, new: Node, before: Node) -> Node | None:
    axes = view.args[1:3] if len(view.args) == 3 else (-2, -1)
    return graph.call(aten.transpose.int, new, *axes, before=before, like=whole)


def _permute(graph: Graph, whole: Node, view: Node, new: Node, before: Node) -> Node | None:
    dims: Any = view.args[1]
    order = [axis_of(dim, len(dims)) for dim in dims]
    back = [order.index(axis) for axis in range(len(order))]
    return graph.call(aten.permute.default, new, back, before=before, like=whole)


def _unsqueeze(graph: Graph, whole: Node, view: Node, new: Node, before: Node) -> Node | None:
    axis = axis_of(int(view.args[1]), len(shape_of(view)))  # pyright: ignore[reportArgumentType]
    return graph.call(aten.squeeze.dim, new, axis, before=before, like=whole)


def _select(graph: Graph, whole: Node, view: Node, new: Node, before: Node) -> Node | None:
    dim, index = graph.operand(view, "dim"), graph.operand(view, "index")
    if not isinstance(index, int):
        return None
    axis = axis_of(dim, len(shape_of(whole)))
    layer = graph.call(aten.unsqueeze.default, new, axis, before=before)
    return _between(graph, whole, layer, (axis, index, index + 1 if index != -1 else LAST), before)


def _slice(graph: Graph, whole: Node, view: Node, new: Node, before: Node) -> Node | None:
    dim, start, stop = (graph.operand(view, name) for name in ("dim", "start", "end"))
    start, stop = (0 if start is None else start), (LAST if stop is None else stop)
    ordered = isinstance(start, int) and isinstance(stop, int)
    same_side = ordered and (start >= 0) == (stop >= 0) and start <= stop
    if graph.operand(view, "step") != 1 or not (same_side or start == 0 or stop == LAST):
        return None
    axis = axis_of(dim, len(shape_of(whole)))
    return _between(graph, whole, new, (axis, start, stop), before)


def _between(
    graph: Graph, whole: Node, new: Node, where: tuple[int, Any, Any], before: Node
) -> Node:
    """``cat(whole[:start], new, whole[stop:])`` along an axis."""
    axis, start, stop = where
    parts = [new]
    if start != 0:
        parts.insert(0, graph.call(aten.slice.Tensor, whole, axis, 0, start, before=before))
    if stop != LAST:
        parts.append(graph.call(aten.slice.Tensor, whole, axis, stop, LAST, before=before))
    return graph.call(aten.cat.default, parts, axis, before=before, like=whole)


_PUT: dict[str, Callable[[Graph, Node, Node, Node, Node], Node | None]] = {
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
    "t": _transpose,
    "mT": _transpose,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "select": _select,
    "slice": _slice,
}
