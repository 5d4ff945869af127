"""Operators of few bits by dense products of PyTorch: their weights are unpacked once.

They compute what the operators of Lamella say. Codes of integers are kept as float32, in which
sums are exact up to 2**24, that is a thousand of the largest products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from lamella.ir.integer_operators import TOP, integer_bias, static_codes
from lamella.ir.operators import round_to_int8, rounded_rows, rounded_tensor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, block: int) -> Tensor:
    """A linear layer; a `block` rounds the input as `linear_nbits` with 8-bit activations does.

    The weight may be wider than the input: blocks are whole, features need not be.
    """
    rounded = round_to_int8(input, block) if block else input
    return functional.linear(rounded, weight[:, : input.shape[-1]].to(input.dtype), bias)


def linear_int8(
    input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, per_row: bool
) -> Tensor:
    """As `lamella::linear_int8`."""
    codes, step = (rounded_rows if per_row else rounded_tensor)(input)
    result = functional.linear(codes, weight) * (step * scales)
    return (result if bias is None else result + bias).to(input.dtype)


def linear_int8_static(
    input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, step: float, zero: int
) -> Tensor:
    """As `lamella::linear_int8_static`."""
    result = functional.linear(static_codes(input, step, zero), weight) * (scales * step)
    return (result if bias is None else result + bias).to(input.dtype)


def conv_int8(  # noqa: PLR0913  (the arguments of the operator)
    input: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    step: float,
    zero: int,
    out_step: float,
    out_zero: int,
) -> Tensor:
    """As `lamella::conv_int8`."""
    factors = scales * step
    shift = None if bias is None else integer_bias(bias, factors).float()
    convolve: Any = functional.conv1d if weight.ndim == 3 else functional.conv2d
    codes = static_codes(input, step, zero)
    total = convolve(codes, weight, shift, stride, padding, dilation, groups)
    ratio = (factors / out_step).reshape(-1, *[1] * (weight.ndim - 2))
    out = ((total * ratio).round() + out_zero).clamp(0, TOP)
    return ((out - out_zero) * out_step).to(input.dtype)
