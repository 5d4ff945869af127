"""Correlations, and how sure a mean is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie.

    Attributes:
        mean: Of the values.
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
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.double()[picks].mean(1)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, ends).tolist()
    return Interval(float(values.double().mean()), low, high)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation along the last axis; 0 where one of the two doesn't vary."""
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(scale > 0, (a * b).sum(-1) / scale, 0.0)
