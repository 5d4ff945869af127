"""Codes and scales in the bytes of the block types of GGUF.

Types of 32 neighbors have float16 scales of their own. In types of 256 neighbors, groups of 16
have scales of few bits that are multiples of one float16 scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
"""Neighbors in a row that a type with scales of its own stores together."""

SUPER = 256
"""Neighbors in a row that a type with scales of few bits stores together."""

SUBGROUP = 16
"""Neighbors that share a scale of few bits."""


def whole(*halves: Tensor, values: Tensor) -> Tensor:
    """Scales (and offsets) before the codes of each group, ``[rows, bytes]``.

    Args:
        halves: float16, ``[rows, groups]``.
        values: The other bytes, ``[rows, groups, n]``.
    """
    front = [half.contiguous().view(torch.uint8).unflatten(-1, (-1, 2)) for half in halves]
    return torch.cat([*front, values.contiguous().view(torch.uint8)], dim=-1).flatten(1)


def nibbles(codes: Tensor) -> Tensor:
    """Two codes of 4 bits a byte: the first half of a group in the low bits."""
    half = GROUP // 2
    return codes[..., :half] | (codes[..., half:] << 4)


def fives(codes: Tensor) -> Tensor:
    """Codes of 5 bits: the fifth bits of a group in 4 bytes, then the others as `nibbles`."""
    fifth = (codes >> 4).unflatten(-1, (4, 8)).int() << torch.arange(8)
    return torch.cat([fifth.sum(-1).to(torch.uint8), nibbles(codes & 0xF)], dim=-1)


def q2_k(slope: Tensor, offset: Tensor, codes: Tensor) -> Tensor:
    """``Q2_K``: ``slope * code - offset``, both not negative, as multiples in 4 bits.

    Args:
        slope: float32, ``[rows, supers, 16]``.
        offset: Likewise.
        codes: In [0, 3], ``[rows, supers, 256]``.
    """
    (large, slopes), (shift, offsets) = (_multiples(value, 15) for value in (slope, offset))
    front = slopes | (offsets << 4)
    body = torch.cat([front.to(torch.uint8), _pairs_of_bits(codes)], dim=-1)
    return _with_tail(body, large, shift)


def q3_k(scale: Tensor, values: Tensor) -> Tensor:
    """``Q3_K``: symmetric codes of 3 bits, scales of 6 bits.

    Args:
        scale: float32, ``[rows, supers, 16]``.
        values: What the weights are, ``[rows, supers, 256]``; rounded with the stored scales.
    """
    large, multiples = _multiples(scale, 31)
    codes = _again(values, large, multiples, 4)
    high = (codes >> 2).unflatten(-1, (8, 32)).int() << torch.arange(8)[:, None]
    stored = multiples + 32
    upper = (stored >> 4).unflatten(-1, (4, 4)) << (2 * torch.arange(4)[:, None])
    parts = (
        high.sum(-2),
        _pairs_of_bits(codes & 3),
        (stored[..., :8] & 0xF) | ((stored[..., 8:] & 0xF) << 4),
        upper.sum(-2),
    )
    return _with_tail(torch.cat([part.to(torch.uint8) for part in parts], dim=-1), large)


def q6_k(scale: Tensor, values: Tensor) -> Tensor:
    """``Q6_K``: symmetric codes of 6 bits, scales of 8 bits; as `q3_k`."""
    large, multiples = _multiples(scale, 127)
    codes = _again(values, large, multiples, 32).unflatten(-1, (2, 128))
    low = (codes[..., :64] & 0xF) | ((codes[..., 64:] & 0xF) << 4)
    high = (codes >> 4).unflatten(-1, (4, 32)) << (2 * torch.arange(4)[:, None])
    parts = (
        low.flatten(-2).to(torch.uint8),
        high.sum(-2).flatten(-2).to(torch.uint8),
        multiples.to(torch.int8).view(torch.uint8),
    )
    return _with_tail(torch.cat(parts, dim=-1), large)


def _multiples(scale: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """One float16 scale for the last axis, and the nearest multiples of it as integers."""
    large = (scale.abs().amax(-1) / most).half()
    step = large.float().unsqueeze(-1)
    safe = torch.where(step == 0, torch.ones_like(step), step)
    return large, (scale / safe).round().clamp(-most, most).int()


def _again(values: Tensor, large: Tensor, multiples: Tensor, zero: int) -> Tensor:
    """The nearest codes around `zero` with the scales as they are stored."""
    step = large.float().unsqueeze(-1) * multiples
    safe = torch.where(step == 0, torch.ones_like(step), step).repeat_interleave(SUBGROUP, -1)
    return ((values / safe).round() + zero).clamp(0, 2 * zero - 1).int()


def _pairs_of_bits(codes: Tensor) -> Tensor:
    """Four codes of 2 bits a byte: of each 128, the four runs of 32 over each other."""
    runs = codes.int().unflatten(-1, (2, 4, 32)) << (2 * torch.arange(4)[:, None])
    return runs.sum(-2).flatten(-2).to(torch.uint8)


def _with_tail(body: Tensor, *halves: Tensor) -> Tensor:
    """The scales of the whole behind everything else, ``[rows, bytes]``."""
    back = [half.contiguous().view(torch.uint8).unflatten(-1, (-1, 2)) for half in halves]
    return torch.cat([body, *back], dim=-1).flatten(1)
