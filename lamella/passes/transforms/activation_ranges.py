"""Ranges for activations of few bits, from a sample of their rows.

A range of `bits` is a scale ``s`` and a zero ``z``: codes ``clip(round(x / s) + z, 0, 2^bits - 1)``
stand for ``s (code - z)``. It covers the interval from the least to the largest value shrunk
about its middle by the factor of least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.ir.reducers import Reducer, State

SHRINK = tuple(1 - 0.025 * step for step in range(29))
"""Factors by which a range is shrunk in the search; at 2 bits a third of the range is best."""

_ENTRIES = 1 << 20
"""Entries of a sample that take part in the search for a range of a whole value."""


@dataclass(frozen=True)
class RowSample(Reducer):
    """Some of the rows, evenly spread over all tokens: float32 ``[rows, channels]``.

    Which ones does not depend on how the samples are batched.

    Attributes:
        limit: Not more rows than this.
        flat: Take entries instead of rows, ``[entries, 1]`` (where rows differ in length).
    """

    limit: int
    flat: bool = False

    def add(self, state: State | None, *values: Tensor) -> State:
        """Rows whose number is a multiple of the step, which doubles when there are too many."""
        (value,) = values
        rows = (value.reshape(-1, 1) if self.flat else value).float()
        kept, step, seen = state or (rows[:0], torch.tensor(1), torch.tensor(0))
        kept = torch.cat([kept, rows[int(-seen % step) :: int(step)]])
        while kept.shape[0] > self.limit:
            kept, step = kept[::2], step * 2
        return kept.clone(), step, seen + rows.shape[0]

    def result(self, state: State) -> Tensor:
        """``[rows, channels]``."""
        return state[0]


@dataclass(frozen=True)
class Range:
    """A scale and a zero for a value, or for each of its channels.

    Attributes:
        scale: Positive, float32, ``[]`` or ``[channels]``.
        zero: The code of zero; need not be whole for channels, whose shift a norm takes.
    """

    scale: Tensor
    zero: Tensor


def range_of(rows: Tensor, bits: int, *, whole: bool = True) -> Range:
    """The range of least squared error for all entries together.

    Args:
        rows: A sample, ``[rows, channels]``.
        bits: Width of the codes.
        whole: Whether the zero is rounded to a code.
    """
    flat = rows.reshape(-1, 1)
    flat = flat[:: max(1, flat.shape[0] // _ENTRIES)]
    found = channel_ranges(flat, bits, whole=whole)
    return Range(found.scale[0], found.zero[0])


def channel_ranges(rows: Tensor, bits: int, *, whole: bool = True) -> Range:
    """The range of least squared error for each column by itself.

    Args:
        rows: A sample, ``[rows, channels]``, or a weight ``[in, out]`` for a range per output.
        bits: Width of the codes.
        whole: Whether zeros are rounded to codes.
    """
    rows, top = rows.float(), (1 << bits) - 1
    low, high = rows.amin(0), rows.amax(0)
    middle, half = (low + high) / 2, (high - low) / 2
    least = torch.full_like(low, torch.inf)
    best = Range(torch.ones_like(low), torch.zeros_like(low))
    for shrink in SHRINK:
        scale = (2 * shrink * half / top).clamp(min=1e-12)
        zero = -(middle - shrink * half) / scale
        zero = zero.round() if whole else zero
        error = (rounded(rows, Range(scale, zero), bits) - rows).square().sum(0)
        better = error < least
        least = torch.where(better, error, least)
        best = Range(torch.where(better, scale, best.scale), torch.where(better, zero, best.zero))
    return best


def rounded(rows: Tensor, range: Range, bits: int) -> Tensor:
    """`rows` as the codes of a range have them; zeros that are not whole shift the grid."""
    codes = (rows / range.scale + range.zero).round().clamp(0, (1 << bits) - 1)
    return (codes - range.zero) * range.scale


def log_scale(entries: Tensor, bits: int) -> Tensor:
    """The largest probability for `lamella::round_log`, of least squared error.

    Args:
        entries: A sample of probabilities, any shape.
        bits: Width of the codes.
    """
    flat = entries.float().reshape(-1)
    flat = flat[:: max(1, flat.shape[0] // _ENTRIES)]
    largest = flat.max().clamp(min=1e-12)
    tried = [largest * 2.0 ** (-step / 8) for step in range(25)]
    errors = [float((_log_rounded(flat, s, bits) - flat).square().sum()) for s in tried]
    return tried[min(range(len(tried)), key=errors.__getitem__)]


def _log_rounded(flat: Tensor, scale: Tensor, bits: int) -> Tensor:
    return torch.ops.lamella.round_log(flat, scale, bits)


@dataclass(frozen=True)
class Reparameterized:
    """What turns ranges of channels into one range: ``x' = x / ratio - shift``.

    Attributes:
        range: The one range of ``x'``.
        ratio: ``[channels]``; the norm is divided by it, the columns are multiplied.
        shift: ``[channels]``; taken from the bias of the norm, added through the layers.
    """

    range: Range
    ratio: Tensor
    shift: Tensor


def reparameterized(ranges: Range, clip: float) -> Reparameterized:
    """One range for all channels, which a norm and the layers behind it make up for.

    With ``s~`` and ``z~`` the means of scales and zeros, ``r = s / s~`` and
    ``d = s~ (z~ - z)``: the codes of ``x / r - d`` in the one range are those of `x` in its own.

    Args:
        ranges: Scales and zeros of the channels.
        clip: Scales and zeros outside of the percentiles ``[clip, 100 - clip]`` over the channels
            are moved to them first, so that few outliers don't blow up weights; what exceeds the
            clipped range of its channel saturates.

    References:
        [Li2023], section 3.2; [Ranjan2024] for clipping.
    """
    scale, zero = (_clipped(one.double(), clip) for one in (ranges.scale, ranges.zero))
    mean_scale, mean_zero = scale.mean(), zero.mean().round()
    ratio, shift = scale / mean_scale, mean_scale * (mean_zero - zero)
    return Reparameterized(Range(mean_scale.float(), mean_zero.float()), ratio, shift)


def _clipped(values: Tensor, clip: float) -> Tensor:
    if clip == 0:
        return values
    return values.clamp(values.quantile(clip / 100), values.quantile(1 - clip / 100))
