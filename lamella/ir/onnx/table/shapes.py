"""Operators on shapes, and operators that only move elements."""

from __future__ import annotations

import itertools
import operator
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.quantized import Quantized
from lamella.ir.onnx.values import Constant, Integer, Integers, Op, Result, Table, Value

aten = torch.ops.aten

_FOREVER = 2**63 - 1
_LISTED = 64


# ---- shapes as values -----------------------------------------------------------------------


def shape(g: Builder, op: Op) -> Result:
    """The sizes of a tensor, as integers."""
    sizes = g.shape(op[0])
    return Integers(sizes[slice(op.attribute("start", 0), op.attribute("end"))])


def size(g: Builder, op: Op) -> Result:
    """The number of elements, as an integer."""
    return Integers((g.product(g.shape(op[0])),), scalar=True)


def concatenate(g: Builder, op: Op) -> Result:
    """Tensors one after the other; integers from shapes stay integers."""
    values = [value for value in op.inputs if value is not None]
    if any(isinstance(value, Integers) for value in values):
        lists = [g.as_integers(value) for value in values]
        known = [found for found in lists if found is not None]
        if len(known) == len(values):
            return Integers(tuple(itertools.chain.from_iterable(f.items for f in known)))
    if len(values) == 1:
        return values[0]
    return g.call(aten.cat.default, values, g.axis(values[0], op.attribute("axis", 0)))


# ---- new sizes ------------------------------------------------------------------------------


def reshape(g: Builder, op: Op) -> Result:
    """The same elements in another shape; 0 keeps a size and -1 is what remains."""
    value, target = op[0], list(g.integers(op[1]))
    if isinstance(value, Integers):
        return _reshaped_integers(op, value, target)
    if not op.attribute("allowzero", 0):
        sizes = g.shape(value) if 0 in target else ()
        target = [sizes[axis] if item == 0 else item for axis, item in enumerate(target)]
    if isinstance(value, Constant) and value.bits is not None:
        numbers = g.numbers(Integers(tuple(target)))
        return Constant(value.tensor.reshape(numbers), value.name, value.bits)
    return reshaped(g, value, target)


def reshaped(g: Builder, value: Value, target: list[Integer]) -> Any:
    """`value` in the shape `target`, or itself if that is its shape."""
    sizes = g.shape(value)
    same = len(sizes) == len(target) and all(
        new == -1 or g.same(old, new) for old, new in zip(sizes, target, strict=True)
    )
    return value if same and target.count(-1) <= 1 else g.call(aten.reshape.default, value, target)


def _reshaped_integers(op: Op, value: Integers, target: list[Integer]) -> Integers:
    op.need(len(target) <= 1, "a vector of sizes in more than one axis")
    return Integers(value.items, not target, value.dtype)


def flatten(g: Builder, op: Op) -> Result:
    """Two axes: those before `axis`, and the others."""
    sizes = g.shape(op[0])
    axis = op.attribute("axis", 1)
    axis = axis + len(sizes) if axis < 0 else axis
    if all(isinstance(item, int) for item in sizes[axis:]):
        return reshaped(g, op[0], [-1 if axis else 1, g.product(sizes[axis:])])
    return reshaped(g, op[0], [g.product(sizes[:axis]), -1])


def unsqueeze(g: Builder, op: Op) -> Result:
    """New axes of size 1."""
    value, axes = op[0], g.numbers(op[1])
    if isinstance(value, Integers) and len(axes) == 1 and value.scalar:
        return Integers(value.items, scalar=False, dtype=value.dtype)
    rank = g.rank(value) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        value = g.call(aten.unsqueeze.default, value, axis)
    return value


def squeeze(g: Builder, op: Op) -> Result:
    """Axes of size 1 removed: those that are named, or all."""
    value, named = op[0], op.optional(1)
    if isinstance(value, Integers):
        op.need(len(value.items) == 1, "to squeeze a vector of several sizes")
        return Integers(value.items, scalar=True, dtype=value.dtype)
    if named is None:
        axes = [axis for axis in range(g.rank(value)) if g.static(value, axis) == 1]
    else:
        axes = [g.axis(value, axis) for axis in g.numbers(named)]
    return g.call(aten.squeeze.dims, value, axes) if axes else value


def expand(g: Builder, op: Op) -> Result:
    """A tensor repeated to the shape that it and a shape broadcast to."""
    value, target = op[0], g.integers(op[1])
    sizes = g.shape(value)
    count = max(len(sizes), len(target))
    old = (1,) * (count - len(sizes)) + tuple(sizes)
    new = (1,) * (count - len(target)) + tuple(target)
    result = [_broadcast(g, *pair) for pair in zip(old, new, strict=True)]
    if len(sizes) == count and all(itertools.starmap(g.same, zip(old, result, strict=True))):
        return value
    return g.call(aten.expand.default, value, result)


def _broadcast(g: Builder, old: Integer, new: Integer) -> Integer:
    if old == 1:
        return new
    return old if new == 1 or isinstance(new, Node) else new


def tile(g: Builder, op: Op) -> Result:
    """A tensor repeated along its axes."""
    value, repeats = op[0], g.integers(op[1])
    if all(item == 1 for item in repeats):
        return value
    if isinstance(value, Integers) and isinstance(repeats[0], int) and repeats[0] <= _LISTED:
        return Integers(value.items * repeats[0], dtype=value.dtype)
    return g.call(aten.repeat.default, value, list(repeats))


# ---- order ----------------------------------------------------------------------------------


def transpose(g: Builder, op: Op) -> Result:
    """The axes in another order, reversed unless it is given."""
    value = op[0]
    rank = g.rank(value)
    order = [axis % max(rank, 1) for axis in op.attribute("perm") or range(rank)[::-1]]
    return permuted(g, value, order)


def permuted(g: Builder, value: Value, order: list[int]) -> Any:
    """`value` with its axes in `order`; the transpose of a weight matrix is a view of it."""
    moved = [axis for axis, source in enumerate(order) if axis != source]
    if not moved:
        return value
    if isinstance(value, Quantized):
        value = g.constant(value)
    if isinstance(value, Constant):
        back = not value.transposed if len(order) == 2 else value.transposed
        return Constant(value.tensor.permute(order), value.name, value.bits, back)
    if len(moved) == 2:
        return g.call(aten.transpose.int, value, *moved)
    return g.call(aten.permute.default, value, order)


def slice_(g: Builder, op: Op) -> Result:
    """A range of each axis; ends past the size are cut, steps may be negative."""
    value = op[0]
    starts, ends = g.integers(op[1]), g.integers(op[2])
    axes = range(len(starts)) if op.optional(3) is None else g.numbers(op[3])
    steps = [1] * len(starts) if op.optional(4) is None else g.numbers(op[4])
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if isinstance(value, Integers):
            first, last = g.numbers(Integers((start, end)))
            value = Integers(value.items[_python_slice(first, last, step)], dtype=value.dtype)
        else:
            value = _sliced(g, op, value, (g.axis(value, axis), start, end, step))
    return value


def _python_slice(start: int, end: int, step: int) -> slice:
    # An end before the first element can't be written as a number in Python.
    return slice(start, None if step < 0 and end < -(2**31) else end, step)


def _sliced(g: Builder, op: Op, value: Value, what: tuple[int, Integer, Integer, int]) -> Value:
    axis, start, end, step = what
    if step > 0:
        if start == 0 and step == 1 and (_is_past(end) or g.same(end, g.shape(value)[axis])):
            return value
        end = _FOREVER if _is_past(end) else end
        return g.call(aten.slice.Tensor, value, axis, start, end, step)
    length = g.static(value, axis)
    whole = start in (-1, _FOREVER) or (isinstance(start, int) and start >= 2**31 - 1)
    if whole and isinstance(end, int) and end <= -(2**31) and step == -1:
        return g.call(aten.flip.default, value, [axis])
    op.need(length is not None, "a negative step along a dynamic axis")
    first, last = g.numbers(Integers((start, end)))
    places = list(range(length or 0))[_python_slice(first, last, step)]
    return g.call(aten.index_select.default, value, axis, Constant(torch.tensor(places)))


def _is_past(end: Integer) -> bool:
    return isinstance(end, int) and end >= 2**31 - 1


def split(g: Builder, op: Op) -> Result:
    """Consecutive parts of one axis, of given or of equal sizes."""
    value = op[0]
    axis = g.axis(value, op.attribute("axis", 0))
    given = op.optional(1)
    count = op.attribute("num_outputs", len(op.outputs))
    sizes = list(g.integers(given)) if given is not None else _equal_parts(g, value, axis, count)
    if isinstance(value, Integers):
        ends = list(itertools.accumulate(g.numbers(Integers(tuple(sizes))), initial=0))
        return tuple(
            Integers(value.items[a:b], dtype=value.dtype) for a, b in itertools.pairwise(ends)
        )
    if isinstance(value, Constant):
        ends = list(itertools.accumulate(g.numbers(Integers(tuple(sizes))), initial=0))
        parts = (g.call(aten.slice.Tensor, value, axis, a, b) for a, b in itertools.pairwise(ends))
        return tuple(parts)
    parts = g.call(aten.split_with_sizes.default, value, sizes, axis)
    wanted = [op.wants(place) for place in range(len(sizes))]
    return tuple(g.pick(parts, place) if want else None for place, want in enumerate(wanted))


def _equal_parts(g: Builder, value: Value, axis: int, count: int) -> list[Integer]:
    """All parts as large as the first, the last may be smaller."""
    whole = g.shape(value)[axis]
    part = g.integer(operator.floordiv, g.integer(operator.add, whole, count - 1), count)
    rest = g.integer(operator.sub, whole, g.integer(operator.mul, part, count - 1))
    return [part] * (count - 1) + [rest]


# ---- larger ---------------------------------------------------------------------------------


def pad(g: Builder, op: Op) -> Result:
    """Elements added (or, by negative numbers, cut) at both ends of axes."""
    value = op[0]
    rank = g.rank(value)
    pads = list(g.integers(op[1]))
    axes = range(rank) if op.optional(3) is None else [g.axis(value, a) for a in g.numbers(op[3])]
    before: list[Integer] = [0] * rank
    after: list[Integer] = [0] * rank
    for place, axis in enumerate(axes):
        before[axis], after[axis] = pads[place], pads[place + len(axes)]
    fill = 0 if op.optional(2) is None else g.number(op[2])
    op.need(fill is not None, "a fill value that depends on the inputs")
    mode = op.attribute("mode", "constant")
    aten_mode = {"edge": "replicate", "wrap": "circular"}.get(mode, str(mode))
    return padded(g, value, list(zip(before, after, strict=True)), aten_mode, fill)


def padded(
    g: Builder,
    value: Value,
    ends: list[tuple[Integer, Integer]],
    mode: str = "constant",
    fill: Any = 0,
) -> Any:
    """`value` padded by ``(before, after)`` of every axis."""
    flat = [item for pair in reversed(ends) for item in pair]
    # ATen counts from the last axis; axes at the front that stay as they are are left out.
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        del flat[-2:]
    if all(item == 0 for item in flat):
        return value
    if mode == "constant" and all(isinstance(item, int) for item in flat):
        return g.call(aten.constant_pad_nd.default, value, flat, fill)
    return g.call(aten.pad.default, value, flat, mode, fill if mode == "constant" else None)


def depth_to_space(g: Builder, op: Op) -> Result:
    """Channels moved into the plane, blocks of `blocksize` squared."""
    value, block = op[0], op.attribute("blocksize")
    if op.attribute("mode", "DCR") == "CRD":
        return g.call(aten.pixel_shuffle.default, value, block)
    batch, channels, height, width = g.shape(value)
    depth = g.integer(operator.floordiv, channels, block * block)
    parts = g.call(aten.reshape.default, value, [batch, block, block, depth, height, width])
    moved = g.call(aten.permute.default, parts, [0, 3, 4, 1, 5, 2])
    tall, wide = (g.integer(operator.mul, item, block) for item in (height, width))
    return g.call(aten.reshape.default, moved, [batch, depth, tall, wide])


def space_to_depth(g: Builder, op: Op) -> Result:
    """Blocks of the plane moved into channels."""
    op.need(op.attribute("mode", "DCR") == "DCR", "another order of channels")
    value, block = op[0], op.attribute("blocksize")
    batch, channels, height, width = g.shape(value)
    low, narrow = (g.integer(operator.floordiv, item, block) for item in (height, width))
    parts = g.call(aten.reshape.default, value, [batch, channels, low, block, narrow, block])
    moved = g.call(aten.permute.default, parts, [0, 3, 5, 1, 2, 4])
    deep = g.integer(operator.mul, channels, block * block)
    return g.call(aten.reshape.default, moved, [batch, deep, low, narrow])


def triangle(g: Builder, op: Op) -> Result:
    """The upper or lower triangle; the rest becomes zero."""
    offset = 0 if op.optional(1) is None else g.number(op[1])
    op.need(offset is not None, "a diagonal that depends on the inputs")
    target = aten.triu.default if op.attribute("upper", 1) else aten.tril.default
    return g.call(target, op[0], offset)


TABLE: Table = MappingProxyType(
    {
        "Concat": concatenate,
        "DepthToSpace": depth_to_space,
        "Expand": expand,
        "Flatten": flatten,
        "Pad": pad,
        "Reshape": reshape,
        "Shape": shape,
        "Size": size,
        "Slice": slice_,
        "SpaceToDepth": space_to_depth,
        "Split": split,
        "Squeeze": squeeze,
        "Tile": tile,
        "Transpose": transpose,
        "Trilu": triangle,
        "Unsqueeze": unsqueeze,
    }
)
"""ONNX operator -> builder."""
