"""Products of 8-bit integers whose inputs have ranges that were measured before.

A static range is a step ``s`` and a zero ``z`` in [0, 255]: a value ``x`` has the code
``clip(round(x / s) + z, 0, 255)`` and stands for ``s * (code - z)``. Nothing is computed from the
input when it arrives, and what lies outside of the range is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from lamella.ir.operators import define, exact

TOP = 255
"""The largest code of an activation."""


def linear_int8_static(
    input: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    step: float,
    zero: int,
) -> Tensor:
    """A linear layer of 8-bit integers whose input has a static range.

    Args:
        input: ``[..., in]``.
        weight: Codes as int8, ``[out, in]``; entry ``[o, i]`` stands for ``scales[o] * code``.
            The references take codes as floats too (see `lamella.ir.operators.exact`).
        scales: float32, ``[out]``.
        bias: ``[out]`` or None.
        step: Step of the input, positive; read as float32.
        zero: Code of the input's zero, in [0, 255].
    """
    codes = static_codes(input, step, zero)
    held = exact(weight)
    total = functional.linear(codes.to(held.dtype), held).float()
    result = total * (_float32(step) * scales)
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
    """A convolution of 8-bit integers; its input and its output have static ranges.

    The sum of integers gets the bias as an integer, is scaled once and rounded to the codes of
    the output: ``clip(round((sum + round(b / (s t))) * (s t / s')) + z', 0, 255)`` for the step
    ``s`` of the input, ``t`` of the weights and ``s'`` of the output. With ``out_zero = 0`` what
    is negative becomes zero: a rectifier behind it is part of it.

    Args:
        input: ``[batch, in, length]`` or ``[batch, in, height, width]``.
        weight: Codes as int8, ``[out, in / groups, *kernel]``; those of an output stand for
            ``scales[out] * code``.
        scales: float32, ``[out]``.
        bias: ``[out]`` or None.
        stride: One number for each axis of the kernel.
        padding: Likewise; zeros.
        dilation: Likewise.
        groups: Parts that the channels fall into.
        step: Step of the input, positive; read as float32.
        zero: Code of the input's zero, in [0, 255].
        out_step: Likewise of the output.
        out_zero: Likewise.
    """
    factors = _float32(step) * scales
    held = exact(weight)
    codes = static_codes(input, step, zero).to(held.dtype)
    convolve = functional.conv1d if weight.ndim == 3 else functional.conv2d
    shift = None if bias is None else integer_bias(bias, factors).to(held.dtype)
    total = convolve(codes, held, shift, stride, padding, dilation, groups).float()
    ratio = (factors / _float32(out_step)).reshape(-1, *[1] * (weight.ndim - 2))
    out = ((total * ratio).round() + out_zero).clamp(0, TOP)
    return ((out - out_zero) * _float32(out_step)).to(input.dtype)


def static_codes(input: Tensor, step: float, zero: int) -> Tensor:
    """Codes around zero, float32, as `QuantizeLinear` of ONNX has them."""
    return ((input.float() / _float32(step)).round() + zero).clamp(0, TOP) - zero


def integer_bias(bias: Tensor, factors: Tensor) -> Tensor:
    """A bias in units of the products that it is added to, int32 ``[out]``."""
    info = torch.iinfo(torch.int32)
    return (bias.double() / factors.double()).round().clamp(info.min, info.max).to(torch.int32)


def static_range(low: float, high: float) -> tuple[float, int]:
    """The step and the zero that cover ``[low, high]`` and zero with 256 codes.

    Zero gets a code of its own, so that padding and what a rectifier cuts off stay exact.

    Raises:
        ValueError: A bound is NaN or infinite.
    """
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)], dtype=torch.float32)
    if not torch.isfinite(ends).all():
        raise ValueError(f"a range from {low} to {high} can't be cut into steps")
    step = (ends[1] - ends[0]) / TOP
    if float(step) < torch.finfo(torch.float32).tiny:
        return 1.0, 0
    return float(step), int((-ends[0] / step).round().clamp(0, TOP))


def _float32(number: float) -> Tensor:
    """A number as kernels read it; dividing by it is no product with its inverse."""
    return torch.tensor(number, dtype=torch.float32)


def _fake_linear(input: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"an input of {input.shape[-1]} features meets a weight for {weight.shape[1]}"
        )
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_conv(  # noqa: PLR0913  (the arguments of the operator)
    input: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *_: object,
    **__: object,
) -> Tensor:
    axes = weight.ndim - 2
    sizes = [
        (input.shape[2 + a] + 2 * padding[a] - dilation[a] * (weight.shape[2 + a] - 1) - 1)
        // stride[a]
        + 1
        for a in range(axes)
    ]
    return input.new_empty((input.shape[0], weight.shape[0], *sizes))


define(
    "linear_int8_static(Tensor input, Tensor weight, Tensor scales, Tensor? bias, float step, "
    "int zero) -> Tensor",
    linear_int8_static,
    _fake_linear,
)
define(
    "conv_int8(Tensor input, Tensor weight, Tensor scales, Tensor? bias, int[] stride, "
    "int[] padding, int[] dilation, int groups, float step, int zero, float out_step, "
    "int out_zero) -> Tensor",
    conv_int8,
    _fake_conv,
)

INTEGER_REFERENCE: Mapping[Callable[..., object], Callable[..., Tensor]] = MappingProxyType(
    {
        torch.ops.lamella.linear_int8_static.default: linear_int8_static,
        torch.ops.lamella.conv_int8.default: conv_int8,
    }
)
"""Each operator of integers with static ranges -> the same in plain PyTorch."""
