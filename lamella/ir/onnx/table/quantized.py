"""Linear quantization: weights that are dequantized when they are used, and rounding."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.quantized import Quantized
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
    block = op.attribute("block_size", 0)
    # The axis says nothing where there is one scale for all.
    one = not block and g.product(g.shape(scale)) == 1
    axis = 0 if one else g.axis(value, op.attribute("axis", 1))
    wanted = op.attribute("output_dtype", 0)
    dtype = dtype_of(wanted, op.label) if wanted else g.dtype(scale)
    if isinstance(value, Constant) and isinstance(scale, Constant) and dtype == g.dtype(scale):
        zero_data = None if zero is None else g.constant(zero).tensor
        bits = value.bits or 8 * value.tensor.element_size()
        return Quantized(value.tensor, scale.tensor, zero_data, axis, block, bits, value.name)
    op.need(not block, "dequantization in blocks of what is not constant")
    wide = cast(g, value, g.dtype(scale))
    if zero is not None:
        moved = cast(g, _along(g, zero, value, axis), g.dtype(scale))
        wide = g.call(aten.sub.Tensor, wide, moved)
    return cast(g, g.call(aten.mul.Tensor, wide, _along(g, scale, value, axis)), dtype)


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
    narrow = isinstance(zero, Constant) and zero.bits is not None
    op.need(dtype in _RANGES and not narrow, "quantization to other than 8 or 16 bits")
    divided = g.call(aten.div.Tensor, value, _along(g, scale, value, axis))
    rounded = g.call(aten.round.default, divided)
    if zero is not None:
        moved = cast(g, _along(g, zero, value, axis), g.dtype(value))
        rounded = g.call(aten.add.Tensor, rounded, moved)
    low, high = _RANGES[dtype]
    return cast(g, g.call(aten.clamp.default, rounded, float(low), float(high)), dtype)


TABLE: Table = MappingProxyType({"DequantizeLinear": dequantize, "QuantizeLinear": quantize})
"""ONNX operator -> builder."""
