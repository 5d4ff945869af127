"""The formats that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lamella.backends.formats import QuantFormat, Shape, in_blocks
from lamella.backends.onnxruntime.emit.dequantized import TWO_BIT_OUTPUTS
from lamella.ir.ops import aten, lam

_LEVEL = "MatMulNBits, accuracy_level=4"
_STANDARD = "DequantizeLinear + MatMul, fused to MatMulNBits"
_TIE = 1e-3
"""A product of floats at a tie may be rounded to the next code of an activation."""
_STEP = 1.01 / 255
"""Likewise for an output that is rounded to 8 bits: one step of its range."""


def _two_bits(shape: Shape) -> int:
    return 4 if shape[0] % TWO_BIT_OUTPUTS else 2


def formats(contrib: bool = True) -> Iterator[QuantFormat]:
    """All of them; without `contrib` in standard operators, whose codes are not padded."""
    yield QuantFormat("fp32", "linear", aten.linear.default, 32, "MatMul")
    if contrib:
        yield from in_blocks("linear", _LEVEL)
    else:
        for found in in_blocks("linear", _STANDARD, padded=False):
            yield replace(found, held_bits=_two_bits) if found.bits == 2 else found
    linear, integers = lam.linear_int8.default, "MatMulIntegerToFloat"
    yield QuantFormat(
        "int8-rows", "linear", linear, 8, integers, activations="int8-row", tolerance=_TIE
    )
    yield QuantFormat(
        "int8-tensor",
        "linear",
        linear,
        8,
        "DynamicQuantizeMatMul",
        activations="int8-tensor",
        tolerance=_TIE,
    )
    yield QuantFormat(
        "int8-static",
        "linear",
        lam.linear_int8_static.default,
        8,
        "QuantizeLinear + MatMulIntegerToFloat",
        activations="int8-static",
        tolerance=_TIE,
    )
    yield QuantFormat("fp32", "embedding", aten.embedding.default, 32, "Gather")
    yield from in_blocks(
        "embedding",
        "GatherBlockQuantized" if contrib else "DequantizeLinear + Gather",
        padded=contrib,
    )
    yield QuantFormat("fp32", "convolution", aten.conv2d.default, 32, "Conv")
    yield QuantFormat(
        "int8",
        "convolution",
        lam.conv_int8.default,
        8,
        "QLinearConv",
        activations="int8-static",
        tolerance=_STEP,
    )
