"""Correlations, and how sure a mean is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A mean, or another statistic, and where it may lie.

    Attributes:
        mean: Of the values, or what else was asked for of all of them.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Tensor, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """Percentile interval of the mean over samples that are drawn with replacement.

    Args:
        values: One number for each sample.
        level: Share of the draws inside of the interval.
        draws: How many.
        seed: Of the draws.

    Raises:
        ValueError: There are no values, or `level` is outside of (0, 1).
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a vector with at least one value is needed, got {list(values.shape)}")
    _check_level(level)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.double()[picks].mean(1)
    return _interval(float(values.double().mean()), means, level)


def resampled(
    statistic: Callable[[Tensor], Tensor],
    count: int,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of any statistic of samples that are drawn with replacement.

    Args:
        statistic: From weights ``[rows, count]``, the share of each sample (they sum to 1), to
            one number for each row.
        count: Samples.
        level: Share of the draws inside of the interval.
        draws: How many.
        seed: Of the draws.

    Returns:
        With the statistic of the samples as they are as its mean.

    Raises:
        ValueError: There are no samples, or `level` is outside of (0, 1).
    """
    if count < 1:
        raise ValueError(f"at least one sample is needed, got {count}")
    _check_level(level)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(count, (draws, count), generator=generator)
    drawn = torch.zeros(draws, count, dtype=torch.float64)
    drawn.scatter_add_(1, picks, torch.full(picks.shape, 1 / count, dtype=torch.float64))
    whole = torch.full((1, count), 1 / count, dtype=torch.float64)
    return _interval(float(statistic(whole)), statistic(drawn), level)


def _interval(value: float, draws: Tensor, level: float) -> Interval:
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(draws, ends).tolist()
    return Interval(value, low, high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation along the last axis; 0 where one of the two doesn't vary."""
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(scale > 0, (a * b).sum(-1) / scale, 0.0)
