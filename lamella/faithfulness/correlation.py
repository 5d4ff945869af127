"""Whether the relevance of many units together says what their removal does.

References:
    [Bhatt2020], section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.faithfulness.intervals import pearson
from lamella.faithfulness.removal import Remove, Score, check_units


def faithfulness_correlation(  # noqa: PLR0913  (what the metric is made of)
    score: Score,
    sample: Tensor,
    relevance: Tensor,
    remove: Remove,
    *,
    subsets: int = 100,
    size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Pearson correlation of the summed relevance of random units and the fall of the score.

    Args:
        score: One number for each sample.
        sample: ``[batch, ...]``.
        relevance: One number for each unit.
        remove: Takes units out.
        subsets: How many sets of units are drawn; all samples get the same.
        size: Units of a set; None means a quarter of all.
        seed: Of the sets.

    Returns:
        One correlation for each sample; 0 where one of the two doesn't vary.

    Raises:
        ValueError: `relevance` does not fit, or a number is out of range.
    """
    check_units(sample, relevance)
    units = relevance.shape[1]
    size = max(units // 4, 1) if size is None else size
    if subsets < 2 or not 1 <= size <= units:
        raise ValueError(
            f"at least 2 subsets of 1 to {units} units are needed, got {subsets} of {size}"
        )
    generator, whole = torch.Generator().manual_seed(seed), score(sample)
    sums: list[Tensor] = []
    falls: list[Tensor] = []
    for _ in range(subsets):
        gone = torch.zeros(units, dtype=torch.bool)
        gone[torch.randperm(units, generator=generator)[:size]] = True
        sums.append(relevance[:, gone].sum(1))
        falls.append(whole - score(remove(sample, gone.expand(len(sample), -1))))
    return pearson(torch.stack(sums, 1), torch.stack(falls, 1))
