"""Operators that make tensors from nothing but numbers and shapes."""

from __future__ import annotations

from types import MappingProxyType

import torch

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.table.elementwise import cast
from lamella.ir.onnx.tensors import dtype_of
from lamella.ir.onnx.values import Constant, Op, Result, Table

aten = torch.ops.aten

_LISTED = 256


def constant(g: Builder, op: Op) -> Result:
    """A constant in one of the spellings of its attribute."""
    attributes = op.attributes
    if "value" in attributes:
        return attributes["value"]
    if "value_float" in attributes or "value_floats" in attributes:
        numbers = attributes.get("value_float", attributes.get("value_floats"))
        return Constant(torch.tensor(numbers, dtype=torch.float32))
    numbers = attributes.get("value_int", attributes.get("value_ints"))
    op.need(numbers is not None, "a constant of strings or a sparse constant")
    return Constant(torch.tensor(numbers, dtype=torch.int64))


def constant_of_shape(g: Builder, op: Op) -> Result:
    """A tensor filled with one number."""
    given = op.attribute("value")
    fill = Constant(torch.zeros(1)) if given is None else given
    sizes = list(g.integers(op[0]))
    dtype = fill.tensor.dtype
    count = sizes[0] if len(sizes) == 1 else None
    if isinstance(count, int) and count <= _LISTED and not dtype.is_floating_point:
        return Constant(torch.full((count,), fill.tensor.item(), dtype=dtype))
    return g.call(aten.full.default, sizes, fill.tensor.item(), dtype=dtype)


def arange(g: Builder, op: Op) -> Result:
    """Numbers from a start to a limit."""
    ends = [g.number(op[place]) for place in range(3)]
    op.need(all(end is not None for end in ends), "a range whose ends depend on data")
    return g.call(aten.arange.start_step, *ends, dtype=g.dtype(op[0]))


def eye_like(g: Builder, op: Op) -> Result:
    """Ones on a diagonal, in the shape of the input."""
    given = op.attribute("dtype")
    dtype = g.dtype(op[0]) if given is None else dtype_of(given, op.label)
    rows, columns = g.shape(op[0])
    row = g.call(aten.arange.start_step, 0, rows, 1, dtype=torch.int64)
    column = g.call(aten.arange.start_step, 0, columns, 1, dtype=torch.int64)
    moved = g.call(aten.add.Tensor, row, op.attribute("k", 0))
    same = g.call(aten.eq.Tensor, g.call(aten.unsqueeze.default, moved, 1), column)
    return cast(g, same, dtype)


def one_hot(g: Builder, op: Op) -> Result:
    """A new axis that is `on` where the index is and `off` elsewhere."""
    indices, depth = op[0], g.number(op[1])
    op.need(depth is not None, "a depth that depends on data")
    axis = op.attribute("axis", -1) % (g.rank(indices) + 1)
    places = cast(g, indices, torch.int64)
    # Places below zero count from the end; what is still outside is off everywhere.
    from_end = g.call(aten.add.Tensor, places, depth)
    places = g.call(aten.where.self, g.call(aten.lt.Scalar, places, 0), from_end, places)
    steps = g.call(aten.arange.start_step, 0, depth, 1, dtype=torch.int64)
    following = g.rank(indices) - axis
    steps = g.call(aten.reshape.default, steps, [-1, *[1] * following])
    hot = g.call(aten.eq.Tensor, g.call(aten.unsqueeze.default, places, axis), steps)
    values = op[2]
    off, on = (g.call(aten.select.int, values, 0, place) for place in (0, 1))
    return g.call(aten.where.self, hot, on, off)


def dropout(g: Builder, op: Op) -> Result:
    """The input; in inference nothing is dropped."""
    training = op.optional(2)
    if training is not None:
        off = g.is_constant(training) and not g.number(training)
        op.need(off, "dropout in training mode")
    mask = None
    if op.wants(1):
        mask = g.call(aten.full.default, list(g.shape(op[0])), True, dtype=torch.bool)
    return op[0], mask


TABLE: Table = MappingProxyType(
    {
        "Constant": constant,
        "ConstantOfShape": constant_of_shape,
        "Dropout": dropout,
        "EyeLike": eye_like,
        "OneHot": one_hot,
        "Range": arange,
    }
)
"""ONNX operator -> builder."""
