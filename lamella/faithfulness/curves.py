"""What becomes of a score while units are taken out, in the order of their relevance.

References:
    [Samek2017], for the curves; [Achtibat2024], section 4, for the area between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamella.faithfulness.removal import Remove, Score, check_units

Order = Literal["morf", "lerf", "random"]


@dataclass(frozen=True)
class Curve:
    """A score after every step.

    Attributes:
        removed: Share of the units that are gone, from 0 to 1, ``[steps + 1]``.
        values: The score of each sample, ``[batch, steps + 1]``.
    """

    removed: Tensor
    values: Tensor

    @property
    def area(self) -> Tensor:
        """Area under the curve of each sample by the trapezoid rule; 1 for a score of 1."""
        return torch.trapezoid(self.values, self.removed, dim=1)


@dataclass(frozen=True)
class Perturbation:
    """Both curves.

    Attributes:
        morf: The most relevant units go first.
        lerf: The least relevant ones go first.
    """

    morf: Curve
    lerf: Curve

    @property
    def abpc(self) -> Tensor:
        """Area between the curves: 0 for a random order, larger is better.

        It is at most 1 for scores in [0, 1]; published figures that sum over steps of 4 % are 4
        times as large.
        """
        return self.lerf.area - self.morf.area

    @property
    def comprehensiveness(self) -> Tensor:
        """The score of the whole sample minus the area under `morf`."""
        return self.morf.values[:, 0] - self.morf.area

    @property
    def sufficiency(self) -> Tensor:
        """The score of the whole sample minus the area under `lerf`; smaller is better."""
        return self.lerf.values[:, 0] - self.lerf.area


def perturbation(
    score: Score,
    sample: Tensor,
    relevance: Tensor,
    remove: Remove,
    *,
    steps: int = 20,
) -> Perturbation:
    """Take out the most, and the least, relevant units first.

    Args:
        score: One number for each sample.
        sample: ``[batch, ...]``.
        relevance: One number for each unit.
        remove: Takes units out.
        steps: Into how many equal steps the removal is cut; the last leaves nothing.

    Raises:
        ValueError: `relevance` does not fit, or `steps` is not between 1 and the units.
    """
    curves = (
        removal_curve(score, sample, relevance, remove, order=order, steps=steps)
        for order in ("morf", "lerf")
    )
    return Perturbation(*curves)


def removal_curve(  # noqa: PLR0913  (what the metric is made of)
    score: Score,
    sample: Tensor,
    relevance: Tensor,
    remove: Remove,
    *,
    order: Order,
    steps: int = 20,
    seed: int = 0,
) -> Curve:
    """The score while units go in one order; units of equal relevance go in their own order.

    Args:
        score: One number for each sample.
        sample: ``[batch, ...]``.
        relevance: One number for each unit.
        remove: Takes units out.
        order: ``"morf"`` most relevant first, ``"lerf"`` least relevant first, ``"random"``.
        steps: Into how many equal steps the removal is cut.
        seed: Of the random order.

    Raises:
        ValueError: `relevance` does not fit, `steps` is not between 1 and the units, or `order`
            is another word.
    """
    check_units(sample, relevance)
    units = relevance.shape[1]
    if not 1 <= steps <= units:
        raise ValueError(f"steps must be between 1 and the {units} units, got {steps}")
    rank = _ranks(relevance, order, seed)
    counts = [units * step // steps for step in range(steps + 1)]
    values = [score(remove(sample, rank < count)) for count in counts]
    removed = torch.tensor(counts, dtype=values[0].dtype) / units
    return Curve(removed, torch.stack(values, dim=1))


def _ranks(relevance: Tensor, order: Order, seed: int) -> Tensor:
    """When each unit goes, from 0 on."""
    if order == "random":
        generator = torch.Generator().manual_seed(seed)
        key = torch.rand(relevance.shape, generator=generator)
    elif order in ("morf", "lerf"):
        key = -relevance if order == "morf" else relevance
    else:
        raise ValueError(f"order must be 'morf', 'lerf' or 'random', got {order!r}")
    return torch.argsort(torch.argsort(key, dim=1, stable=True), dim=1)
