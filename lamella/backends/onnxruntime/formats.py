"""The formats that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Iterator

from lamella.backends.formats import QuantFormat, in_blocks
from lamella.ir.ops import aten, lam

_LEVEL = "MatMulNBits, accuracy_level=4"
_STANDARD = "DequantizeLinear + MatMul, fused to MatMulNBits"
_TIE = 1e-3
"""A product of floats at a tie may be rounded to the next code of an activation."""
_STEP = 1.01 / 255
"""Likewise for an output that is rounded to 8 bits: one step of its range."""


def formats(contrib: bool = True) -> Iterator[QuantFormat]:
    """All of them; without `contrib` in standard operators.

    In standard operators there is no type of 2 bits before opset 25, so that such codes are
    stored in 4 and run in the kernel of 4.
    """
    yield QuantFormat("fp32", "linear", aten.linear.default, 32, "MatMul")
    yield from in_blocks("linear", _LEVEL if contrib else _STANDARD)
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
        "embedding", "GatherBlockQuantized" if contrib else "DequantizeLinear + Gather"
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
