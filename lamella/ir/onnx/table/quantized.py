"""Linear quantization: weights that are dequantized when they are used, and rounding."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.table.elementwise import cast
from lamella.ir.onnx.tensors import dtype_of
from lamella.ir.onnx.values import Constant, Op, Result, Table, Value

aten = torch.ops.aten

_RANGES = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int16: (-32768, 32767),
    torch.uint16: (0, 65535),
}


def dequantize(g: Builder, op: Op) -> Result:
    """``(x - zero_point) scale``, per tensor, per axis or per block of an axis."""
    value, scale, zero = op[0], op[1], op.optional(2)
    axis, block = op.attribute("axis", 1), op.attribute("block_size", 0)
    if isinstance(value, Constant) and isinstance(scale, Constant):
        zero_data = None if zero is None else g.constant(zero).tensor
        data = dequantized(value.tensor, scale.tensor, zero_data, (axis, block))
        return Constant(data, value.name)
    op.need(not block, "dequantization in blocks of what is not constant")
    wide = cast(g, value, g.dtype(scale))
    if zero is not None:
        moved = cast(g, _along(g, zero, value, axis), g.dtype(scale))
        wide = g.call(aten.sub.Tensor, wide, moved)
    return g.call(aten.mul.Tensor, wide, _along(g, scale, value, axis))


def dequantized(
    codes: Tensor, scale: Tensor, zero: Tensor | None, layout: tuple[int, int]
) -> Tensor:
    """Numbers from codes.

    Args:
        codes: Integers.
        scale: A number, a vector along the axis, or as `codes` with one per block.
        zero: As `scale`, or None.
        layout: The axis, and the length of a block along it (0: no blocks).
    """
    axis, block = layout
    wide = codes.to(scale.dtype)
    if zero is not None:
        wide = wide - _spread(zero.to(scale.dtype), codes, axis, block)
    return wide * _spread(scale, codes, axis, block)


def _spread(numbers: Tensor, like: Tensor, axis: int, block: int) -> Tensor:
    """`numbers` so that they broadcast against `like`."""
    if block:
        return numbers.repeat_interleave(block, axis).narrow(axis, 0, like.shape[axis])
    if numbers.numel() == 1:
        return numbers.reshape(())
    shape = [1] * like.ndim
    shape[axis] = numbers.numel()
    return numbers.reshape(shape)


def _along(g: Builder, numbers: Value, like: Value, axis: int) -> Any:
    """A number or a vector along `axis`, so that it broadcasts against `like`."""
    if g.product(g.shape(numbers)) == 1:
        return g.call(aten.reshape.default, numbers, [])
    shape = [1] * g.rank(like)
    shape[axis] = -1
    return g.call(aten.reshape.default, numbers, shape)


def quantize(g: Builder, op: Op) -> Result:
    """``clip(round(x / scale) + zero_point)`` as 8 or 16 bit integers."""
    value, scale, zero = op[0], op[1], op.optional(2)
    axis = op.attribute("axis", 1)
    op.need(not op.attribute("block_size", 0), "quantization in blocks")
    dtype = torch.uint8 if zero is None else g.dtype(zero)
    if zero is None and op.attribute("output_dtype", 0):
        dtype = dtype_of(op.attribute("output_dtype"), op.label)
    op.need(dtype in _RANGES, f"quantization to {dtype}")
    divided = g.call(aten.div.Tensor, value, _along(g, scale, value, axis))
    rounded = g.call(aten.round.default, divided)
    if zero is not None:
        moved = cast(g, _along(g, zero, value, axis), g.dtype(value))
        rounded = g.call(aten.add.Tensor, rounded, moved)
    low, high = _RANGES[dtype]
    return cast(g, g.call(aten.clamp.default, rounded, float(low), float(high)), dtype)


TABLE: Table = MappingProxyType({"DequantizeLinear": dequantize, "QuantizeLinear": quantize})
"""ONNX operator -> builder."""
