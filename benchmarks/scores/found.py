"""What a score says from some sequences, and what it costs; kept on disk as soon as known."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.scores.cases import SEQUENCES, Case, first, outputs
from benchmarks.scores.judged import Table
from benchmarks.scores.work import products, timed
from benchmarks.zoo.cache import ROOT
from lamella.ir.quantize import Format
from lamella.passes.base import Analyses
from lamella.passes.scores import BitScore, BitScoreReport
from lamella.passes.scores.error import WeightError

FORMATS = tuple(Format(bits, 64) for bits in (2, 4, 8))

TIMED = 2
"""Batches of a forward run that is timed: its time is told for a whole set, by products."""

KEPT = "losses, products, times"
"""What files hold; those with something else are not read."""

_BUILT_ON = re.compile(r"^from (lamella\.passes\.scores\.\w+) import", re.MULTILINE)
_NAMES = ("base", "target", "interactions")
"""Modules of scores that say what is scored, and not how."""


@dataclass(frozen=True)
class Run:
    """A score and what it sees.

    Attributes:
        case: The model.
        score: With the seed.
        count: How many sequences, exactly; 0 without data.
        seed: Of the set that they are taken from.
    """

    case: Case
    score: BitScore
    count: int
    seed: int

    @classmethod
    def of(cls, case: Case, score: BitScore, seed: int, count: int | None = None) -> Run:
        """On `count` sequences; None means as many as the score takes, or a whole set."""
        count = cls.taken(score) if count is None else count
        if hasattr(score, "sequences"):
            score = with_options(score, sequences=count)
        return cls(case, score, count if score.needs_samples else 0, seed)

    @staticmethod
    def taken(score: BitScore) -> int:
        """How many sequences of a set a score takes."""
        return min(getattr(score, "sequences", SEQUENCES), SEQUENCES)


@dataclass(frozen=True)
class Found:
    """What a run gave.

    Attributes:
        losses: Weight -> format -> score.
        products: Products of matrices in forward runs of a whole set, or None.
        times: Time of one core in that of such a forward run, from those of two batches just
            before and after; or None.
    """

    losses: Table
    products: float | None
    times: float | None


def with_options(score: BitScore, **options: Any) -> BitScore:
    """`score` with other options."""
    made: Any = score
    return dataclasses.replace(made, **options)


def found_of(run: Run, *, count: bool = False, time: bool = False) -> Found:
    """What a run gives, or gave before.

    Args:
        run: The score and its sequences.
        count: Whether its products are needed; counting takes time itself.
        time: Whether its time is needed.
    """
    path = _path(run)
    known = json.loads(path.read_text()) if path.exists() else {}
    if not known or (count and known["products"] is None) or (time and known["times"] is None):
        known = _measured(run, known, count=count, time=time)
        keep(path, known)
    losses = {
        name: dict(zip(FORMATS, values, strict=True)) for name, values in known["losses"].items()
    }
    return Found(losses, known["products"], known["times"])


def _measured(run: Run, known: dict[str, Any], *, count: bool, time: bool) -> dict[str, Any]:
    samples = first(run.case, run.count or SEQUENCES, run.seed)

    def fresh() -> BitScoreReport:
        return Analyses(run.case.graph, samples).get(run.score)

    def untimed() -> BitScoreReport:
        analyses = Analyses(run.case.graph, samples)
        analyses.supply(WeightError(FORMATS), _errors(run.case))
        return analyses.get(run.score)

    found = {"products": None, "times": None, **known}
    report = None
    if time and found["times"] is None:
        part = products(functools.partial(_forward, run.case, TIMED))[1]
        report, times = timed(fresh, functools.partial(_forward, run.case, TIMED))
        found["times"] = times * part / products_of_forward(run.case)
    if count and found["products"] is None:
        report, flops = products(untimed)
        found["products"] = flops / products_of_forward(run.case)
    losses = (report or untimed()).losses
    found["losses"] = {name: [row[f] for f in FORMATS] for name, row in losses.items()}
    return found


@functools.cache
def _errors(case: Case) -> BitScoreReport:
    """The errors of rounding, which many scores multiply something with."""
    return Analyses(case.graph).get(WeightError(FORMATS))


@functools.cache
def products_of_forward(case: Case) -> float:
    """Of a whole set, in FLOPs: the unit that costs are told in."""
    return products(functools.partial(_forward, case))[1]


def _forward(case: Case, batches: int | None = None) -> object:
    return outputs(case.graph, case.seen[0].batches[:batches])


def _path(run: Run) -> Path:
    """Where a run is kept: the options, how the score is computed, and what from."""
    digest = first(run.case, run.count, run.seed).digest if run.count else "no data"
    key = hashlib.sha256("|".join([repr(run.score), digest, KEPT]).encode())
    key.update(source_of(type(run.score)))
    return ROOT.parent / "scores" / f"{run.case.name}-{run.score.name}-{key.hexdigest()[:16]}.json"


def keep(path: Path, data: object) -> None:
    """Write a whole file or none."""
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(data))
    aside.replace(path)


@functools.cache
def source_of(score: type) -> bytes:
    """The sources of the module of a score and of those that it is built on."""
    return "".join(sorted(set(_sources(sys.modules[score.__module__])))).encode()


def _sources(module: ModuleType) -> Iterator[str]:
    """The source of the module of a score and of those that it is built on."""
    source = inspect.getsource(module)
    yield source
    for name in _BUILT_ON.findall(source):
        if name.rpartition(".")[2] not in _NAMES:
            yield from _sources(sys.modules[name])
