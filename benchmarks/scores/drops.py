"""Scores of branches and blocks: as they are, computed again after each drop, and greedy."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks.record import Result
from benchmarks.scores.cases import Case
from benchmarks.scores.judged import DropsTruth, interval
from benchmarks.scores.truth import Measured, drop_losses, droppable, measured_on_unseen, without
from lamella.data import Batch
from lamella.passes.base import Analyses
from lamella.passes.scores import Score, score
from lamella.passes.scores.base import Level
from lamella.passes.scores.registry import SCORES
from lamella.passes.scores.relevance import RelevanceScore
from lamella.passes.scores.target import single_sequences

logger = logging.getLogger(__name__)

SHARES = (12, 6, 4)
"""One in so many parts goes."""

RANDOM_SEEDS = 5
AGAIN = ("lim", "relevance")
"""Scores that are also computed again after each drop."""

GREEDY = 8
"""Sequences of the samples that the greedy choice measures on."""

GREEDY_LABEL = "kl on samples, greedy"

Order = Sequence[str]


@dataclass(frozen=True)
class Parts:
    """The parts of one level of a case, and the measured losses without them.

    Attributes:
        case: The model.
        level: Blocks or branches.
        measured: The losses on unseen sequences.
    """

    case: Case
    level: Level
    measured: Measured

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parts that can go."""
        return tuple(droppable(self.case.graph, self.level))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many go, rising."""
        return tuple(sorted({max(len(self.names) // share, 1) for share in SHARES}))

    @cached_property
    def truth(self) -> DropsTruth:
        """Losses on unseen sequences."""
        return DropsTruth(
            self.names, lambda gone: drop_losses(self.measured, self.level, gone), self.tokens
        )

    @property
    def tokens(self) -> torch.Tensor:
        """Of each unseen sequence."""
        return self.measured.tokens


@dataclass(frozen=True)
class Chosen:
    """What a method drops.

    Attributes:
        importance: Of every part, where the method says it at once; else empty.
        order: What goes first, as far as it is needed.
    """

    importance: Mapping[str, float]
    order: Order


def methods(parts: Parts, only: Sequence[str] = ()) -> Iterator[tuple[str, list[Chosen]]]:
    """Label -> what each seed drops; only these labels, if there are any."""
    named: dict[str, Callable[[int], Score]] = {
        name: functools.partial(_registered, name, parts) for name in SCORES
    }
    for preset, start in (("gradient", "drawn"), ("attnlrp", "drawn"), ("gradient", "logit")):
        named[f"relevance preset={preset} start={start}"] = functools.partial(
            _relevance, parts, preset, start
        )
    for label, build in named.items():
        if only and label not in only:
            continue
        seeds = RANDOM_SEEDS if label == "random" else len(parts.case.seen)
        yield label, [_at_once(parts, build(seed), seed) for seed in range(seeds)]
    for label in AGAIN:
        if only and f"{label}, again after each drop" not in only:
            continue
        found = [_again(parts, named[label](seed), seed) for seed in range(len(parts.case.seen))]
        yield f"{label}, again after each drop", found
    if not only or GREEDY_LABEL in only:
        yield GREEDY_LABEL, [_greedy(parts, seed) for seed in range(1)]


def _registered(name: str, parts: Parts, seed: int) -> Score:
    made: Any = score(name, parts.level, seed=seed)
    if not hasattr(made, "sequences"):
        return made
    return dataclasses.replace(made, sequences=parts.case.sequences)


def _relevance(parts: Parts, preset: str, start: str, seed: int) -> Score:
    sequences = parts.case.sequences
    return RelevanceScore(parts.level, preset, start, sequences=sequences, seed=seed)


def _at_once(parts: Parts, by: Score, seed: int) -> Chosen:
    report = Analyses(parts.case.graph, parts.case.seen[seed % len(parts.case.seen)]).get(by)
    importance = {name: report.importance()[name] for name in parts.names}
    return Chosen(importance, sorted(importance, key=lambda name: importance[name]))


def _again(parts: Parts, by: Score, seed: int) -> Chosen:
    """The least important part goes, and all others are scored again."""
    gone: list[str] = []
    for _ in range(parts.counts[-1]):
        graph = without(parts.case.graph, parts.level, gone)
        found = Analyses(graph, parts.case.seen[seed % len(parts.case.seen)]).get(by).importance()
        left = [name for name in parts.names if name not in gone]
        # Where norms follow branches, what is left of a block may be no block any more.
        scored = [name for name in left if name in found]
        gone.append(min(scored or left, key=lambda name: found.get(name, 0.0)))
    return Chosen({}, gone)


def _greedy(parts: Parts, seed: int) -> Chosen:
    """The part without which the loss on samples is least, given those that are gone."""
    seen: tuple[Batch, ...] = tuple(single_sequences(parts.case.seen[seed]))[:GREEDY]
    measured = Measured(parts.case.graph, seen, f"{parts.case.name}-seen")
    gone: list[str] = []
    singles: dict[str, float] = {}
    for step in range(parts.counts[-1]):
        left = [name for name in parts.names if name not in gone]
        losses = {n: sum(drop_losses(measured, parts.level, [*gone, n])) for n in left}
        singles = singles or losses
        gone.append(min(left, key=lambda name: losses[name]))
        logger.info("%s: greedy step %d: %s", parts.case.name, step, gone[-1])
    return Chosen(singles, gone)


def scored(case: Case, level: Level, only: Sequence[str] = ()) -> dict[str, tuple[object, ...]]:
    """Label -> Spearman over single parts, and the regret of sets."""
    parts = Parts(case, level, measured_on_unseen(case))
    chosen = dict(methods(parts, only))
    losses = {
        label: [[parts.truth.mean(one.order[:k]) for k in parts.counts] for one in several]
        for label, several in chosen.items()
    }
    least = [_least(losses, place) for place in range(len(parts.counts))]
    found: dict[str, tuple[object, ...]] = {}
    for label, several in chosen.items():
        ranks = [parts.truth.rank(one.importance) for one in several if one.importance]
        regrets = [
            torch.stack([loss / best - 1 for loss, best in zip(of_seed, least, strict=True)]).mean(
                0
            )
            for of_seed in losses[label]
        ]
        rank = str(interval(ranks)) if ranks else "-"
        found[label] = (rank, str(interval(regrets)))
        logger.info("%s, %s: %s: %s", case.name, level, label, found[label])
    return found


def _least(losses: Mapping[str, Sequence[Sequence[torch.Tensor]]], place: int) -> torch.Tensor:
    """The losses of the best set of a size that any method found."""
    every = [of_seed[place] for several in losses.values() for of_seed in several]
    return min(every, key=lambda loss: float(loss[0]))


def table(
    level: Level, cases: Sequence[Case], found: Sequence[Mapping[str, tuple[object, ...]]]
) -> Result:
    """One row for each method, with the figures of all models side by side."""
    labels = dict.fromkeys(label for one in found for label in one)
    rows = [(label, *(c for one in found for c in one.get(label, ("-", "-")))) for label in labels]
    what = "blocks" if level == "block" else "branches"
    sizes = ", ".join(
        f"{case.name}: {'/'.join(map(str, Parts(case, level, measured_on_unseen(case)).counts))} "
        f"of {len(droppable(case.graph, level))}"
        for case in cases
    )
    return Result(
        "scores_drops" if level == "sublayer" else "scores_drop_blocks",
        f"Scores of {what} against the measured loss on unseen sequences",
        ("score", *(f"{case.name}: {part}" for case in cases for part in ("Spearman", "regret"))),
        rows,
        (
            "Spearman: with the loss without each single one. Regret: measured loss without the "
            f"first ones together, over that of the best such set that any method found, minus 1; "
            f"mean over sizes ({sizes}). Means over disjoint sets of samples (random: "
            f"{RANDOM_SEEDS} seeds, greedy: one set) and [95 % of sets and of unseen sequences "
            "drawn with replacement].",
            f"Greedy measures the loss on {GREEDY} sequences of the samples without every part "
            "that is left, again after each drop.",
        ),
    )
