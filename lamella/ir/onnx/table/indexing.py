"""Gathering, scattering, sorting."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.table.elementwise import cast
from lamella.ir.onnx.values import Constant, Integers, Op, Result, Table, Value

aten = torch.ops.aten


def gather(g: Builder, op: Op) -> Result:
    """Slices of one axis; of shapes it is an integer, of a weight matrix an embedding."""
    value, indices = op[0], op[1]
    axis = g.axis(value, op.attribute("axis", 0))
    listed = g.as_integers(indices)
    if isinstance(value, Integers) and listed is not None and listed.known:
        picked = tuple(value.items[place] for place in g.numbers(listed))
        return Integers(picked, listed.scalar, value.dtype)
    if listed is not None and listed.known:
        return _static_gather(g, value, axis, listed)
    if isinstance(value, Constant) and axis == 0 and g.rank(value) == 2:
        return g.call(aten.embedding.default, value, cast(g, indices, torch.int64))
    if g.rank(indices) == 1 and not isinstance(indices, Node):
        return g.call(aten.index_select.default, value, axis, indices)
    return g.call(aten.index.Tensor, value, [*[None] * axis, _index(g, indices)])


def _static_gather(g: Builder, value: Value, axis: int, indices: Integers) -> Value:
    places = g.numbers(indices)
    if indices.scalar:
        return g.call(aten.select.int, value, axis, places[0])
    first = places[0] if places else 0
    if places and places == list(range(first, first + len(places))) and first >= 0:
        return g.call(aten.slice.Tensor, value, axis, first, first + len(places))
    size = g.static(value, axis)
    if size is not None:
        places = [place % size for place in places]
    if any(place < 0 for place in places):
        return g.call(aten.index.Tensor, value, [*[None] * axis, Constant(torch.tensor(places))])
    return g.call(aten.index_select.default, value, axis, Constant(torch.tensor(places)))


def _index(g: Builder, indices: Value) -> Any:
    """Indices as int64; what is a node is kept as it is."""
    return cast(g, indices, torch.int64)


def gather_elements(g: Builder, op: Op) -> Result:
    """One element per index, along an axis."""
    value = op[0]
    axis = g.axis(value, op.attribute("axis", 0))
    return g.call(aten.gather.default, value, axis, _positive(g, op, value, axis))


def _positive(g: Builder, op: Op, value: Value, axis: int) -> Value:
    """The indices of `op`; constant ones are counted from the front, as ATen wants."""
    indices = _index(g, op[1])
    if isinstance(indices, Node) or not bool((g.constant(indices).tensor < 0).any()):
        return indices
    size = g.static(value, axis)
    op.need(size is not None, "negative indices into a dynamic axis")
    return g.call(aten.remainder.Scalar, indices, size)


def gather_nd(g: Builder, op: Op) -> Result:
    """Slices at coordinates in the last axis of the indices."""
    value, indices, batch = op[0], op[1], op.attribute("batch_dims", 0)
    return g.call(aten.index.Tensor, value, _coordinates(g, op, indices, batch))


def _coordinates(g: Builder, op: Op, indices: Value, batch: int) -> list[Any]:
    """One index tensor per axis: arange along batch axes, then the columns of `indices`."""
    rank = g.rank(indices)
    depth = g.static(indices, rank - 1)
    op.need(depth is not None, "a dynamic number of coordinates")
    found: list[Any] = []
    for axis, size in enumerate(g.shape(indices)[:batch]):
        steps = g.call(aten.arange.start_step, 0, size, 1, dtype=torch.int64)
        found.append(g.call(aten.reshape.default, steps, [-1, *[1] * (rank - 2 - axis)]))
    wide = _index(g, indices)
    found += [g.call(aten.select.int, wide, rank - 1, place) for place in range(depth or 0)]
    return found


def scatter_nd(g: Builder, op: Op) -> Result:
    """Slices at coordinates replaced, or added to."""
    reduction = op.attribute("reduction", "none")
    op.need(reduction in ("none", "add"), f"reduction {reduction!r}")
    places = _coordinates(g, op, op[1], 0)
    return g.call(aten.index_put.default, op[0], places, op[2], reduction == "add")


def scatter_elements(g: Builder, op: Op) -> Result:
    """Single elements replaced along an axis."""
    value, reduction = op[0], op.attribute("reduction", "none")
    op.need(reduction == "none", f"reduction {reduction!r}")
    axis = g.axis(value, op.attribute("axis", 0))
    return g.call(aten.scatter.src, value, axis, _positive(g, op, value, axis), op[2])


def top_k(g: Builder, op: Op) -> Result:
    """The largest or smallest elements along an axis, and their places."""
    value, count = op[0], g.number(op[1])
    op.need(count is not None, "a number of elements that depends on data")
    axis = g.axis(value, op.attribute("axis", -1))
    order = bool(op.attribute("largest", 1)), bool(op.attribute("sorted", 1))
    both = g.call(aten.topk.default, g.node(value), count, axis, *order)
    return g.pick(both, 0), g.pick(both, 1)


TABLE: Table = MappingProxyType(
    {
        "Gather": gather,
        "GatherElements": gather_elements,
        "GatherND": gather_nd,
        "ScatterElements": scatter_elements,
        "ScatterND": scatter_nd,
        "TopK": top_k,
    }
)
"""ONNX operator -> builder."""
