"""Operators of Lamella that only adjoints need: a scan that keeps its states, dense weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lamella.ir.operators import define
from lamella.ir.packing import dequantize


def linear_scan(decay: Tensor, update: Tensor) -> Tensor:
    """All states of ``state_t = decay_t state_(t-1) + update_t``, from zero.

    Args:
        decay: ``[batch, channels, sequence, states]``; axes of size 1 are repeated.
        update: ``[batch, channels, sequence, states]``.

    Returns:
        As `update`.
    """
    states = torch.empty_like(update, memory_format=torch.contiguous_format)
    state = torch.zeros_like(update[:, :, 0])
    for step in range(update.shape[2]):
        state = decay[:, :, step] * state + update[:, :, step]
        states[:, :, step] = state
    return states


def dequantize_nbits(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, block: int, features: int
) -> Tensor:
    """The dense weight ``[out, features]`` of codes; layouts as in `lamella::linear_nbits`.

    The result is float32, or wider where the scales are.
    """
    wide = scales.to(torch.promote_types(scales.dtype, torch.float32))
    # Codes of a row that ends within a block leave a gap; the fake kernel promises that none is.
    return dequantize(packed, wide, zero_points, bits, block, features).contiguous()


def _fake_dequantize(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, block: int, features: int
) -> Tensor:
    dtype = torch.promote_types(scales.dtype, torch.float32)
    return scales.new_empty((packed.shape[0], features), dtype=dtype)


define(
    "linear_scan(Tensor decay, Tensor update) -> Tensor",
    linear_scan,
    lambda decay, update: torch.empty_like(update, memory_format=torch.contiguous_format),
)
define(
    "dequantize_nbits(Tensor packed, Tensor scales, Tensor? zero_points, int bits, int block, "
    "int features) -> Tensor",
    dequantize_nbits,
    _fake_dequantize,
)

ADJOINT_REFERENCE: Mapping[Callable[..., object], Callable[..., Tensor]] = MappingProxyType(
    {
        torch.ops.lamella.linear_scan.default: linear_scan,
        torch.ops.lamella.dequantize_nbits.default: dequantize_nbits,
    }
)
"""Each operator -> the same in plain PyTorch."""
