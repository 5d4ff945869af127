"""Operators that round activations to the values of few codes and leave them floating point.

They emulate storage and arithmetic that the graph they stand in does not have: it tells what a
format of so many bits does to a model, and runs no faster. Keys and values rounded to 8 bits
become codes where the graph continues from a cache (`lamella.rewrite.incremental`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lamella.ir.operators import define


def round_uniform(input: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest of ``2**bits`` values in steps of `scale`: ``scale * (code - zero)``.

    ``code = clip(round(x / scale) + zero, 0, 2**bits - 1)``, half to even.

    Args:
        input: Floating point, ``[..., channels]``.
        scale: Positive, of the dtype of `input` and of a shape that its last axes broadcast:
            without axes, ``[channels]``, ``[heads, 1, width]``.
        zero: The code of zero, likewise; outside of the codes where the range has no zero.
        bits: 1 to 16.
    """
    codes = ((input / scale).round() + zero).clamp(0, (1 << bits) - 1)
    return (codes - zero) * scale


def round_log(input: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest of ``2**bits - 1`` powers of the root of two below `scale`, or zero.

    ``code = round(-2 log2(x / scale))`` stands for ``scale * 2**(-code / 2)``; the last code and
    all beyond stand for zero, and what is above `scale` becomes `scale`.

    Args:
        input: Not negative, floating point (probabilities of a softmax).
        scale: Positive, without axes, of the dtype of `input`.
        bits: 1 to 16.
    """
    codes = (torch.log2(input / scale) * -2.0).round().clamp(min=0)
    return torch.where(codes < (1 << bits) - 1, torch.exp2(codes * -0.5) * scale, 0.0)


def _fake(input: Tensor, *_: object) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


define("round_uniform(Tensor input, Tensor scale, Tensor zero, int bits) -> Tensor",
       lambda *args: round_uniform(*args).contiguous(), _fake)  # fmt: skip
define("round_log(Tensor input, Tensor scale, int bits) -> Tensor",
       lambda *args: round_log(*args).contiguous(), _fake)  # fmt: skip

ROUNDING_REFERENCE: Mapping[Callable[..., object], Callable[..., Tensor]] = MappingProxyType(
    {
        torch.ops.lamella.round_uniform.default: round_uniform,
        torch.ops.lamella.round_log.default: round_log,
    }
)
"""Each operator -> the same in plain PyTorch."""
