"""Scores of weights: everything that is registered, and some settings of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import Result
from benchmarks.scores.cases import Case, outputs
from benchmarks.scores.judged import BUDGETS, BitsTruth, Table, interval
from benchmarks.scores.truth import Measured, bit_losses, measured_on_unseen
from benchmarks.scores.work import counted, timed
from benchmarks.zoo.cache import ROOT
from lamella.data import Samples
from lamella.errors import LamellaError
from lamella.ir.quantize import Format
from lamella.passes.base import Analyses
from lamella.passes.scores import BitScore, BitScoreReport, bit_score
from lamella.passes.scores.prior import ZdBits
from lamella.passes.scores.registry import BIT_SCORES
from lamella.passes.scores.relevance_bits import RelevanceBits

logger = logging.getLogger(__name__)

FORMATS = tuple(Format(bits, 64) for bits in (2, 4, 8))
RANDOM_SEEDS = 10

ONCE = ("kl", "hawq", "hawq-eigenvalue")
"""Scores that cost tens to hundreds of forwards: run once on models of millions of weights."""

SMALLER: Mapping[str, Mapping[str, int]] = {"hawq-eigenvalue": {"sequences": 2, "rounds": 6}}
"""Settings of scores that would take an hour."""

KEPT = "products, times"
"""What files hold beside the losses; those with something else are not read."""

ZD_VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"both_sides": True},
    {"pooled": False},
    {"both_sides": True, "pooled": False},
    {"threshold": 2.0},
)
"""The ways to count that implementations of ZD differ in, beside that of the paper."""


@dataclass(frozen=True)
class Found:
    """A score from one set of samples.

    Attributes:
        losses: Weight -> format -> score.
        forwards: Products of matrices in forward runs of the whole set of samples; counted for
            the first set.
        times: Time of one core in those of forward runs of the whole set just before and after;
            of the other sets, unless there is one alone.
    """

    losses: Table
    forwards: float
    times: float


Builder = Callable[[int], BitScore]


def builders(case: Case) -> dict[str, Builder]:
    """Label -> the score for a seed, on all sequences of a set unless it takes fewer itself."""
    found: dict[str, Builder] = {name: _registered(name, case) for name in BIT_SCORES}
    found["fisher draws=1"] = lambda seed: _with(found["fisher"](seed), {"draws": 1})
    for options in ZD_VARIANTS:
        told = " ".join(f"{name}={value}" for name, value in options.items())
        found[f"zd {told}"] = _zd(options)
    for preset in ("gradient", "relp", "attnlrp", "cp"):
        found[f"relevance preset={preset} draws=1"] = _relevance(case, preset, "drawn")
    found["relevance start=logit"] = _relevance(case, "gradient", "logit")
    return found


def _registered(name: str, case: Case) -> Builder:
    def build(seed: int) -> BitScore:
        made = _with(bit_score(name, FORMATS, seed=seed), SMALLER.get(name, {}))
        return _smaller(made, "sequences", case.sequences)

    return build


def _relevance(case: Case, preset: str, start: str) -> Builder:
    def build(seed: int) -> BitScore:
        return RelevanceBits(
            FORMATS, preset=preset, start=start, sequences=case.sequences, draws=1, seed=seed
        )

    return build


def _zd(options: Mapping[str, Any]) -> Builder:
    return lambda _: ZdBits(FORMATS, **options)


def _smaller(score: BitScore, option: str, most: int) -> BitScore:
    """`score` with one of its options at most `most`, if it has it."""
    now = getattr(score, option, None)
    return score if now is None or now <= most else _with(score, {option: most})


def _with(score: BitScore, options: Mapping[str, Any]) -> BitScore:
    made: Any = score
    return dataclasses.replace(made, **options)


@dataclass(frozen=True)
class Judge:
    """A case with the measured losses of its weights."""

    case: Case
    measured: Measured
    truth: BitsTruth

    @classmethod
    def of(cls, case: Case) -> Judge:
        """Measure what is not known."""
        measured = measured_on_unseen(case)
        losses = bit_losses(measured, FORMATS)
        return cls(case, measured, BitsTruth(case.graph, losses, measured.tokens))

    def row(self, several: Sequence[Found]) -> tuple[str, str, str, float, float]:
        """Spearman, that within a width, regret, and what it costs in products and in time."""
        figures = (
            interval([measure(one.losses) for one in several])
            for measure in (self.truth.rank, self.truth.rank_within, self.truth.regret)
        )
        rank, within, regret = map(str, figures)
        times = statistics.median(one.times for one in several[len(several) > 1 :])
        return rank, within, regret, several[0].forwards, times


def found_of(case: Case, score: BitScore, seed: int) -> Found:
    """What a score says from one set of samples, or what it said before."""
    path = _path(case, score, seed)
    if not path.exists():
        samples = case.seen[seed % len(case.seen)]
        run = functools.partial(_fresh, case, samples, score)
        forward = functools.partial(outputs, case.graph, samples.batches)
        # Counting takes time itself, and gives the same for every set.
        if seed == 0:
            report, forwards = counted(run, forward)
            times = timed(run, forward)[1] if _seeds(case, score) == 1 else 0.0
        else:
            forwards, (report, times) = 0.0, timed(run, forward)
        _keep(path, report.losses, forwards, times)
    data = json.loads(path.read_text())
    losses = {
        name: dict(zip(FORMATS, values, strict=True)) for name, values in data["losses"].items()
    }
    return Found(losses, data["forwards"], data["times"])


def _fresh(case: Case, samples: Samples, score: BitScore) -> BitScoreReport:
    return Analyses(case.graph, samples).get(score)


def _path(case: Case, score: BitScore, seed: int) -> Path:
    """Where a score is kept: its options, the module that defines it, and what it is run on."""
    source = Path(inspect.getfile(type(score))).read_bytes()
    parts = [repr(score).encode(), source, case.seen[seed % len(case.seen)].digest.encode()]
    key = hashlib.sha256(b"|".join([*parts, KEPT.encode()]))
    return ROOT.parent / "scores" / f"{case.name}-{score.name}-{key.hexdigest()[:16]}.json"


def _keep(path: Path, losses: Table, forwards: float, times: float) -> None:
    data = {
        "losses": {name: [by_format[f] for f in FORMATS] for name, by_format in losses.items()},
        "forwards": forwards,
        "times": times,
    }
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(data))
    aside.replace(path)


def rows_of(judge: Judge, only: Sequence[str]) -> dict[str, tuple[object, ...]]:
    """Label -> figures of every score."""
    rows: dict[str, tuple[object, ...]] = {}
    for label, build in builders(judge.case).items():
        if only and label not in only:
            continue
        row = _row(judge, label, [build(seed) for seed in range(_seeds(judge.case, build(0)))])
        if row is not None:
            rows[label] = row
    return rows


def _seeds(case: Case, score: BitScore) -> int:
    """How often a score is run, each time with another seed and another set of samples."""
    if score.name == "random":
        return RANDOM_SEEDS
    if not score.needs_samples or (score.name in ONCE and case.name != "vit"):
        return 1
    return len(case.seen)


def _row(judge: Judge, label: str, scores: Sequence[BitScore]) -> tuple[object, ...] | None:
    """The figures of a score; None, and why, where it can't be computed for the model."""
    try:
        several = [found_of(judge.case, one, seed) for seed, one in enumerate(scores)]
    except LamellaError as error:
        logger.warning("%s: no %s: %s", judge.case.name, label, error)
        return None
    row = judge.row(several)
    logger.info("%s: %s: %s", judge.case.name, label, row)
    return row


def table(case: Case, only: Sequence[str]) -> Result:
    """One row for each score of a model."""
    rows = [(label, *cells) for label, cells in rows_of(Judge.of(case), only).items()]
    return Result(
        f"scores_bits_{case.name}",
        f"{case.name}: scores of weights against the measured loss of each single rounding, over "
        "all (weight, bits) and within a width",
        ("score", "Spearman", "within a width", "regret", "products", "time"),
        rows,
        (
            f"{len(case.unseen)} unseen sequences, scores from {len(case.seen)} sets of "
            f"{case.sequences}. Blocks of 64, inputs rounded to 8 bits. Means over disjoint sets "
            f"of samples, each with a seed of its own (random: {RANDOM_SEEDS} seeds; without "
            f"data, and {', '.join(ONCE)} but on vit: once), and [95 % of sets and of unseen "
            "sequences drawn with replacement].",
            "Scores of blocks (lim, zd, luq, owl, ends) and of branches (similarity) are priors: "
            "scaled to [0.1, 1] and multiplied by the relative error of the weight in a width, as "
            "allocate-bits does; hawq multiplies the mean curvature by the squared error, as its "
            "paper does.",
            "Regret: measured loss (single changes, added) of the plans that a score chooses at "
            f"{', '.join(f'{b:g}' for b in BUDGETS)} bits, over that of the best plans, minus 1.",
            "products, time: products of matrices, and time of one core, in those of a forward "
            "run of all samples of a set, in their batches; times are medians, each beside forward "
            "runs just before and after. All round weights, which takes time and no products.",
            "hawq-eigenvalue: 2 sequences and at most 6 rounds of power iteration.",
        ),
    )
