"""Layers of 8-bit integers that hand over codes, and not floats.

A product of oneDNN adds the bias, applies an activation, adds a second input and rounds to the
codes of the layer that reads it, all while the result is in registers. Codes differ from those of
the layers one by one where a value lies half-way between two, up to the rounding of float32.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from lamella.ir.integer_operators import TOP

Grid = tuple[float, int]
"""Step and zero of codes, see `lamella.ir.integer_operators`."""

Output = tuple[str, float, int]
"""What a product gives, ``"float"``, ``"bfloat16"`` or ``"codes"``, and the grid of codes."""

FLOAT: Output = ("float", 1.0, 0)

_DTYPES = {"float": torch.float32, "bfloat16": torch.bfloat16, "codes": torch.uint8}

GELU, GELU_TANH, RELU, NONE = "gelu", "gelu tanh", "relu", "none"
_ACTIVATIONS = {
    GELU: ("gelu", "none"),
    GELU_TANH: ("gelu", "tanh"),
    RELU: ("relu", ""),
    NONE: ("none", ""),
}


def codes_of(input: Tensor, step: float, zero: int) -> Tensor:
    """Codes as uint8, ``clip(round(input / step) + zero, 0, 255)``."""
    wide = input.float()
    if not _has_quantizer():
        rounded = (wide / step).round_().add_(zero).clamp_(0, TOP)
        return rounded.to(torch.uint8)
    found = torch.quantize_per_tensor(wide, step, zero, torch.quint8)
    # The codes where they lie; `int_repr` would copy them.
    codes = torch.empty(0, dtype=torch.uint8)
    return codes.set_(found.untyped_storage(), 0, found.shape, found.stride())


@functools.cache
def _has_quantizer() -> bool:
    """Whether PyTorch rounds in one go, which is three times as fast as step by step."""
    if not hasattr(torch, "quantize_per_tensor"):
        return False
    with warnings.catch_warnings():
        # It warns once a process that it will go.
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
    return True


def product(  # noqa: PLR0913  (the arguments of the operator)
    codes: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    grid: Grid,
    output: Output = FLOAT,
    activation: str = NONE,
    other: Tensor | None = None,
) -> Tensor:
    """``activation(codes @ weight + bias) + other``, rounded to what is wanted.

    Args:
        codes: uint8, ``[..., in]``.
        packed: Codes of the weight as `kernels.packed_integers` gives them.
        scales: float32, ``[out]``.
        bias: ``[out]`` or None.
        grid: Step and zero of `codes`.
        output: What is wanted.
        activation: One of those that oneDNN knows.
        other: Is added; float32, and not together with an activation.
    """
    kind, step, zero = output
    flat = codes.flatten(0, -2)
    weights = (packed, scales, torch.zeros(scales.shape, dtype=torch.int32))
    written = (step, zero, _DTYPES[kind])
    shape = (*codes.shape[:-1], scales.shape[0])
    if other is not None and (other.shape != shape or other.dtype is not torch.float32):
        return product(codes, packed, scales, bias, grid, output, activation) + other
    call = torch.ops.onednn.qlinear_pointwise
    if other is None:
        name, algorithm = _ACTIVATIONS[activation]
        found = call(flat, *grid, *weights, bias, *written, name, [], algorithm)
    else:
        # The sum is taken in place of a copy.
        added = other.reshape(-1, shape[-1])
        ends = (1.0, 0, "add", 1.0, "none", [], "")
        found = call.binary(flat, *grid, *weights, added, bias, *written, *ends)
    return found.reshape(shape)
