"""What every method drops: scores as they are, computed again after each drop, and greedy."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from benchmarks.scores.cases import SEQUENCES, SETS, Case, first
from benchmarks.scores.found import keep, products_of_forward, source_of
from benchmarks.scores.judged import DropsTruth
from benchmarks.scores.magnitude import MagnitudeScore
from benchmarks.scores.truth import Measured, drop_losses, droppable, outputs, without
from benchmarks.scores.work import products
from benchmarks.zoo.cache import ROOT
from lamella.passes.base import Analyses
from lamella.passes.scores import Score, score
from lamella.passes.scores.base import Level
from lamella.passes.scores.relevance import RelevanceScore
from lamella.passes.scores.relevance_of_parts import PartScoreReport, RelevanceOfParts
from lamella.passes.scores.structure import LimScore
from lamella.passes.scores.target import single_sequences

logger = logging.getLogger(__name__)

SHARES = (12, 6, 4)
"""One in so many parts goes."""

RANDOM_SEEDS = 5

FORWARDS = 3.0
"""What a method may cost, in forward runs of a whole set, where it can be told."""

GREEDY = 16
"""Sequences of the greedy choice that may cost what it does."""

Order = Sequence[str]


@dataclass(frozen=True)
class Picked:
    """What goes.

    Attributes:
        importance: Of every part, where a method says it at once; else empty.
        order: What goes first, as far as it is needed.
        flops: Products that it took, where they were counted for several levels together.
    """

    importance: Mapping[str, float]
    order: Order
    flops: float = 0.0


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
            self.names,
            lambda gone: drop_losses(self.measured, self.level, gone),
            self.measured.tokens,
        )


@dataclass(frozen=True)
class Method:
    """A way to choose.

    Attributes:
        pick: From a model, a number of sequences and a seed to what it drops.
        sequences: How many it sees; None means as many as `FORWARDS` pay for, 0 needs none.
        probe: Sequences that its cost is first counted on.
        seeds: How often it is run.
        by: The score that it builds on.
    """

    pick: Callable[[Parts, int, int], Picked] = field(repr=False)
    sequences: int | None = None
    probe: int = 8
    seeds: int = SETS
    by: type[Score] = LimScore


@dataclass(frozen=True)
class Chosen:
    """What a method drops.

    Attributes:
        importance: As in `Picked`.
        order: As in `Picked`.
        count: Sequences that it saw.
        products: In forward runs of a whole set; of the first seed.
    """

    importance: Mapping[str, float]
    order: Order
    count: int
    products: float


def methods() -> dict[str, Method]:
    """Label -> how it chooses."""
    found = {
        "lim": Method(_registered("lim"), SEQUENCES),
        "lim, all sequences": Method(_registered("lim"), SETS * SEQUENCES, seeds=1),
        "similarity": Method(_registered("similarity"), SEQUENCES),
        "relevance": Method(_relevance("cp", "drawn"), by=RelevanceScore),
    }
    for preset, start in (("gradient", "drawn"), ("attnlrp", "drawn"), ("gradient", "logit")):
        found[f"relevance preset={preset} start={start}"] = Method(
            _relevance(preset, start), by=RelevanceScore
        )
    found |= {name: Method(_registered(name), 0, seeds=1) for name in ("zd", "size")}
    found["magnitude"] = Method(_magnitude, 0, seeds=1, by=MagnitudeScore)
    found["random"] = Method(_registered("random"), 0, seeds=RANDOM_SEEDS)
    found["lim, again after each drop"] = Method(_again(_lim))
    found["relevance, again after each drop"] = Method(_again(_cp), by=RelevanceScore)
    found["kl on samples, each part alone"] = Method(_measured, probe=1)
    found["kl on samples, greedy"] = Method(_greedy, probe=1)
    found[f"kl on samples, greedy, {GREEDY} sequences"] = Method(_greedy, GREEDY, seeds=1)
    return found


def chosen(parts: Parts, label: str, method: Method) -> list[Chosen]:
    """What each seed drops."""
    count = method.sequences
    if count is None:
        cost = _kept(parts, label, method, method.probe, 0).products
        most = SEQUENCES if method.by is LimScore else SETS * SEQUENCES
        count = min(most, max(1, round(method.probe * FORWARDS / cost)))
    return [_kept(parts, label, method, count, seed) for seed in range(method.seeds)]


def _kept(parts: Parts, label: str, method: Method, count: int, seed: int) -> Chosen:
    """What a method drops, or dropped before."""
    name, seen = parts.case.name, first(parts.case, count or 1, seed).digest
    key = hashlib.sha256(f"{label}|{count}|{seed}|{seen}|{parts.names}|{parts.counts}".encode())
    key.update(source_of(method.by))
    path = ROOT.parent / "scores" / f"{name}-{parts.level}-{key.hexdigest()[:16]}.json"
    if not path.exists():
        picked, flops = products(lambda: method.pick(parts, count, seed))
        cost = max(flops, picked.flops) / products_of_forward(parts.case)
        keep(path, [picked.importance, picked.order, count, cost])
        logger.info("%s, %s: %s from %d sequences", name, parts.level, label, count)
    return Chosen(*json.loads(path.read_text()))


def _by_importance(parts: Parts, importance: Mapping[str, float], flops: float = 0.0) -> Picked:
    known = {name: importance[name] for name in parts.names}
    return Picked(known, sorted(known, key=lambda name: known[name]), flops)


def _magnitude(parts: Parts, count: int, seed: int) -> Picked:
    report = Analyses(parts.case.graph).get(MagnitudeScore(parts.level))
    return _by_importance(parts, report.importance())


def _registered(name: str) -> Callable[[Parts, int, int], Picked]:
    def pick(parts: Parts, count: int, seed: int) -> Picked:
        analyses = Analyses(parts.case.graph, first(parts.case, count or 1, seed))
        by = score(name, parts.level, seed=seed)
        return _by_importance(parts, analyses.get(by).importance())

    return pick


def _relevance(preset: str, start: str) -> Callable[[Parts, int, int], Picked]:
    def pick(parts: Parts, count: int, seed: int) -> Picked:
        report, flops = _of_parts(parts.case, preset, start, count, seed)
        values = report.of(parts.level).values
        return _by_importance(parts, {name: value for name, (value,) in values.items()}, flops)

    return pick


@functools.cache
def _of_parts(
    case: Case, preset: str, start: str, count: int, seed: int
) -> tuple[PartScoreReport, float]:
    """What `RelevanceScore` asks for, of blocks and branches from one and the same run."""
    asked = RelevanceOfParts(
        ("block", "sublayer"), preset, start, "mean", sequences=count, seed=seed
    )
    return products(lambda: Analyses(case.graph, first(case, count, seed)).get(asked))


def _lim(parts: Parts, count: int, seed: int) -> Score:
    return LimScore(parts.level)


def _cp(parts: Parts, count: int, seed: int) -> Score:
    return RelevanceScore(parts.level, sequences=count, seed=seed)


def _again(build: Callable[[Parts, int, int], Score]) -> Callable[[Parts, int, int], Picked]:
    """The least important part goes, and all others are scored again."""

    def pick(parts: Parts, count: int, seed: int) -> Picked:
        gone: list[str] = []
        samples, by = first(parts.case, count, seed), build(parts, count, seed)
        for _ in range(parts.counts[-1]):
            graph = without(parts.case.graph, parts.level, gone)
            found = Analyses(graph, samples).get(by).importance()
            left = [name for name in parts.names if name not in gone]
            # Where norms follow branches, what is left of a block may be no block any more.
            scored = [name for name in left if name in found]
            gone.append(min(scored or left, key=lambda name: found.get(name, 0.0)))
        return Picked({}, gone)

    return pick


def _measured(parts: Parts, count: int, seed: int) -> Picked:
    """The loss on samples without every part alone."""
    return _by_importance(parts, next(_losses(parts, count, seed)))


def _greedy(parts: Parts, count: int, seed: int) -> Picked:
    """The part without which the loss on samples is least, given those that are gone."""
    steps = list(_losses(parts, count, seed))
    return Picked(steps[0], [min(step, key=lambda name: step[name]) for step in steps])


def _losses(parts: Parts, count: int, seed: int) -> Iterator[dict[str, float]]:
    """The losses without each part that is left; then the least one goes, and again."""
    batches = tuple(single_sequences(first(parts.case, count, seed)))
    measured = Measured(parts.case.graph, batches, "")
    gone: list[str] = []
    for _ in range(parts.counts[-1]):
        losses: dict[str, float] = {}
        for name in (name for name in parts.names if name not in gone):
            changed = outputs(without(parts.case.graph, parts.level, [*gone, name]), batches)
            losses[name] = sum(measured.losses(changed))
        yield losses
        gone.append(min(losses, key=lambda name: losses[name]))
