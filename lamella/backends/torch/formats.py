"""The formats that the eager backend has kernels for; others are unpacked once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from lamella.backends.formats import EXACT, QuantFormat, Shape, in_blocks
from lamella.backends.torch.held import Integers
from lamella.backends.torch.kernels import INT4_BLOCKS, int4_obstacle
from lamella.ir.ops import aten, lam

_PRODUCTS: Mapping[Integers, str] = MappingProxyType(
    {"onednn": "onednn.qlinear_pointwise", "traced": "_int_mm", "floats": "linear of codes"}
)
"""What multiplies integers -> the operator that does."""

_BFLOAT16 = 2e-2
"""Inputs, scales and results with 8 bits of precision, instead of rounded to 8 bits."""


def formats(bfloat16: bool = False, integers: Integers = "onednn") -> Iterator[QuantFormat]:
    """All of them; with `bfloat16` those that multiply in it."""
    if bfloat16:
        yield from _in_bfloat16()
    else:
        yield QuantFormat("fp32", "linear", aten.linear.default, 32, "linear")
    yield from of_integers(integers, bfloat16)
    yield QuantFormat("fp32", "embedding", aten.embedding.default, 32, "embedding")
    yield QuantFormat("fp32", "convolution", aten.conv2d.default, 32, "conv2d")


def of_integers(integers: Integers, bfloat16: bool = False) -> Iterator[QuantFormat]:
    """Linear layers in 8-bit integers."""
    linear, static = lam.linear_int8.default, lam.linear_int8_static.default
    # Where oneDNN is of no use, bfloat16 has weights of 8 bits in a kernel of their own.
    product = _PRODUCTS[integers]
    kernel = f"{product}, else int8pack" if bfloat16 else product
    right = _BFLOAT16 if bfloat16 else EXACT
    yield QuantFormat(
        "int8-rows", "linear", linear, 8, kernel, activations="int8-row", tolerance=right
    )
    yield QuantFormat(
        "int8-tensor", "linear", linear, 8, kernel, activations="int8-tensor", tolerance=right
    )
    yield QuantFormat("int8-static", "linear", static, 8, product, activations="int8-static")


def _in_bfloat16() -> Iterator[QuantFormat]:
    yield QuantFormat(
        "bf16",
        "linear",
        aten.linear.default,
        16,
        "linear in bfloat16",
        activations="bfloat16",
        tolerance=_BFLOAT16,
    )
    for found in in_blocks("linear", "int4pack", (4,), "bfloat16"):
        if found.block in INT4_BLOCKS:
            yield QuantFormat(
                found.name,
                "linear",
                found.operator,
                4,
                found.kernel,
                found.block,
                found.symmetric,
                found.scales,
                "bfloat16",
                _BFLOAT16,
                _int4,
            )


def _int4(shape: Shape) -> str:
    return int4_obstacle(shape[0])
