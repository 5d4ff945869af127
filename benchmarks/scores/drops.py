"""Scores of branches and blocks against the measured loss without them, with what they cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from benchmarks.record import Result
from benchmarks.scores.cases import SEQUENCES, SETS, Case
from benchmarks.scores.choices import (
    FORWARDS,
    RANDOM_SEEDS,
    Chosen,
    Parts,
    chosen,
    methods,
)
from benchmarks.scores.judged import interval
from benchmarks.scores.truth import droppable, measured_on_unseen
from lamella.passes.scores.base import Level

logger = logging.getLogger(__name__)

Row = tuple[object, ...]
PARTS = ("sequences", "products", "Spearman", "regret")


def scored(case: Case, level: Level, only: Sequence[str] = ()) -> dict[str, Row]:
    """Label -> sequences, products, Spearman over single parts, and the regret of sets."""
    parts = Parts(case, level, measured_on_unseen(case))
    found = {
        label: chosen(parts, label, method)
        for label, method in methods().items()
        if not only or label in only
    }
    losses = {
        label: [[parts.truth.mean(one.order[:k]) for k in parts.counts] for one in several]
        for label, several in found.items()
    }
    least = [_least(losses, place) for place in range(len(parts.counts))]
    rows: dict[str, Row] = {}
    for label, several in found.items():
        rows[label] = _row(parts, several, losses[label], least)
        logger.info("%s, %s: %s: %s", case.name, level, label, rows[label])
    return rows


def _row(
    parts: Parts,
    several: Sequence[Chosen],
    losses: Sequence[Sequence[torch.Tensor]],
    least: Sequence[torch.Tensor],
) -> Row:
    ranks = [parts.truth.rank(one.importance) for one in several if one.importance]
    regrets = [
        torch.stack([loss / best - 1 for loss, best in zip(of_seed, least, strict=True)]).mean(0)
        for of_seed in losses
    ]
    rank = str(interval(ranks)) if ranks else "-"
    return several[0].count or "-", several[0].products, rank, str(interval(regrets))


def _least(losses: Mapping[str, Sequence[Sequence[torch.Tensor]]], place: int) -> torch.Tensor:
    """The losses of the best set of a size that any method found."""
    every = [of_seed[place] for several in losses.values() for of_seed in several]
    return min(every, key=lambda loss: float(loss[0]))


def table(level: Level, cases: Sequence[Case], found: Sequence[Mapping[str, Row]]) -> Result:
    """One row for each method, with the figures of all models side by side."""
    labels = dict.fromkeys(label for one in found for label in one)
    rows = [
        (label, *(c for one in found for c in one.get(label, ("-",) * len(PARTS))))
        for label in labels
    ]
    what = "blocks" if level == "block" else "branches"
    sizes = ", ".join(
        f"{case.name}: {'/'.join(map(str, Parts(case, level, measured_on_unseen(case)).counts))} "
        f"of {len(droppable(case.graph, level))}"
        for case in cases
    )
    return Result(
        "scores_drops" if level == "sublayer" else "scores_drop_blocks",
        f"Scores of {what} against the measured loss on unseen sequences",
        ("score", *(f"{case.name}: {part}" for case in cases for part in PARTS)),
        rows,
        (
            "Spearman: with the loss without each single one. Regret: measured loss without the "
            f"first ones together, over that of the best such set that any method found, minus 1; "
            f"mean over sizes ({sizes}). Means over {SETS} seeds, each with sequences of its own "
            f"as far as they reach (random: {RANDOM_SEEDS} seeds; without data, all sequences and "
            "the dearest greedy choice: one) and [95 % of seeds and of unseen sequences drawn with "
            "replacement].",
            f"products: of matrices, in forward runs of {SEQUENCES} sequences. Relevance, scores "
            "that are computed again after each drop and measured losses see as many sequences "
            f"as cost {FORWARDS:g}, lim and measured losses at most {SEQUENCES}.",
            "kl on samples: the measured loss without each part; greedy measures again after each "
            "drop, without every part that is left.",
        ),
    )
