"""Comprehensiveness and sufficiency of rationales, as the ERASER benchmark has them.

References:
    [DeYoung2020], section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.faithfulness.removal import Remove, Score, check_units

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Shares of the units that make a rationale."""


@dataclass(frozen=True)
class Erasure:
    """Means over the shares, for each sample.

    Attributes:
        comprehensiveness: How much the score falls without the rationale; larger is better.
        sufficiency: How much it falls when nothing else is left; smaller is better.
    """

    comprehensiveness: Tensor
    sufficiency: Tensor


def erasure(
    score: Score,
    sample: Tensor,
    relevance: Tensor,
    remove: Remove,
    *,
    shares: Sequence[float] = SHARES,
) -> Erasure:
    """Take out the most relevant units, or all others.

    Args:
        score: One number for each sample: the probability of the class that was predicted.
        sample: ``[batch, ...]``.
        relevance: One number for each unit.
        remove: Takes units out.
        shares: Sizes of the rationale in (0, 1]; one unit at least.

    Raises:
        ValueError: `relevance` does not fit, or a share is outside of (0, 1].
    """
    check_units(sample, relevance)
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong or not shares:
        raise ValueError(f"shares must be in (0, 1], got {list(shares)}")
    rank = torch.argsort(torch.argsort(-relevance, dim=1, stable=True), dim=1)
    whole = score(sample)
    falls: list[tuple[Tensor, Tensor]] = []
    for share in shares:
        chosen = rank < max(round(share * relevance.shape[1]), 1)
        without, alone = score(remove(sample, chosen)), score(remove(sample, ~chosen))
        falls.append((whole - without, whole - alone))
    first, second = (torch.stack(each).mean(0) for each in zip(*falls, strict=True))
    return Erasure(first, second)
