"""Scores of weights at equal cost: each gets as many sequences as three forward runs pay for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.record import Result
from benchmarks.scores.bits import Builder, Judge, builders, standard
from benchmarks.scores.cases import SEQUENCES, SETS, Case
from benchmarks.scores.found import Found, Run, found_of, with_options
from lamella.passes.scores import BitScore

logger = logging.getLogger(__name__)

FORWARDS: Mapping[str, float] = {"vit": 3.0, "minilm": 3.0, "lm": 1.0}
"""What every score may cost, in forward runs of a whole set."""

WITHIN = 0.06
"""A cost that is off by a smaller share counts as equal."""

MOST = SETS * SEQUENCES


@dataclass(frozen=True)
class Fitted:
    """A score at the cost of all others.

    Attributes:
        count: Its sequences; 0 without data.
        found: What each seed gave, the first with its products.
    """

    count: int
    found: Sequence[Found]


def fitted(case: Case, build: Builder) -> Fitted:
    """The number of sequences from the cost of others, measured again at that number."""
    score, price = build(0), FORWARDS[case.name]
    if not score.needs_samples:
        return Fitted(0, standard(case, build))
    counts = {Run.taken(score): cost(case, score, Run.taken(score))}
    while len(counts) < 4:
        count = better(counts, price)
        if count in counts:
            break
        counts[count] = cost(case, _alone(score), count)
    count = min(counts, key=lambda one: abs(counts[one] - price))
    if count == Run.taken(score):
        return Fitted(count, standard(case, build))
    # All sequences there are can be taken once.
    seeds = range(1 if count == MOST else SETS)
    runs = [Run.of(case, _alone(build(seed)), seed, count) for seed in seeds]
    return Fitted(count, [found_of(run, count=run.seed == 0) for run in runs])


def better(counts: dict[int, float], price: float) -> int:
    """Where a straight line through the two nearest costs, or one and 0, meets the price."""
    near = sorted(counts, key=lambda one: abs(counts[one] - price))[:2]
    count = near[0]
    if abs(counts[count] / price - 1.0) < WITHIN:
        return count
    other, paid = (near[1], counts[near[1]]) if len(near) > 1 else (0, 0.0)
    slope = (counts[count] - paid) / (count - other)
    return min(MOST, max(1, round(count + (price - counts[count]) / slope)))


def cost(case: Case, score: BitScore, count: int) -> float:
    """Products in forward runs of a whole set."""
    found = found_of(Run.of(case, score, 0, count), count=True).products
    assert found is not None
    return found


def _alone(score: BitScore) -> BitScore:
    """One draw for each sequence, where fewer sequences would mean more draws."""
    return with_options(score, draws=1) if getattr(score, "draws", 1) is None else score


def table(cases: Sequence[Case], only: Sequence[str]) -> Result:
    """One row for each score, with the figures of all models side by side."""
    labels = [label for label in builders(cases[0]) if not only or label in only]
    columns = [_rows(Judge.of(case), labels) for case in cases]
    parts = ("sequences", "products", "Spearman", "regret")
    rows = [(label, *(cell for rows in columns for cell in rows[label])) for label in labels]
    return Result(
        "scores_bits_equal",
        f"Scores of weights at equal cost in forward runs of {SEQUENCES} sequences ("
        + ", ".join(f"{case.name}: {FORWARDS[case.name]:g}" for case in cases)
        + "), against the measured loss of each single rounding",
        ("score", *(f"{case.name}: {part}" for case in cases for part in parts)),
        rows,
        (
            "Sequences: as many as cost that, of all " + f"{MOST}; the products of matrices are "
            f"counted at that number and told in forward runs of {SEQUENCES} sequences. Scores "
            "without data cost nothing, some can't be had for the price (one sequence is dearer), "
            "and some don't reach it with all sequences.",
            f"Means over {SETS} seeds, each with sequences of its own as far as they reach (all "
            "sequences: one seed; random: 10), and [95 % of seeds and of unseen sequences drawn "
            "with replacement]. Spearman over all (weight, bits) and regret as in the tables of "
            "single models; one draw for each sequence in fisher and fisher-gram.",
        ),
    )


def _rows(judge: Judge, labels: Sequence[str]) -> dict[str, tuple[object, ...]]:
    rows: dict[str, tuple[object, ...]] = {}
    for label in labels:
        one = fitted(judge.case, builders(judge.case)[label])
        rank, _, regret = judge.figures(one.found)
        rows[label] = (one.count or "-", one.found[0].products, rank, regret)
        logger.info("%s: %s: %s", judge.case.name, label, rows[label])
    return rows
