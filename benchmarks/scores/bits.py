"""Scores of weights: everything that is registered, and some settings of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.record import Result
from benchmarks.scores.cases import SEQUENCES, SETS, Case
from benchmarks.scores.found import FORMATS, Found, Run, found_of, with_options
from benchmarks.scores.judged import BUDGETS, BitsTruth, interval
from benchmarks.scores.magnitude import MagnitudeBits
from benchmarks.scores.truth import Measured, bit_losses, measured_on_unseen
from lamella.errors import LamellaError
from lamella.passes.scores import BitScore, bit_score
from lamella.passes.scores.prior import ZdBits
from lamella.passes.scores.registry import BIT_SCORES
from lamella.passes.scores.relevance_bits import RelevanceBits

logger = logging.getLogger(__name__)

RANDOM_SEEDS = 10

SETTINGS: Mapping[str, Mapping[str, int]] = {
    "hawq-eigenvalue": {"sequences": 1, "rounds": 6},
    "lm hawq": {"sequences": 2},
    "lm hawq-eigenvalue": {"sequences": 1, "rounds": 2},
}
"""Settings of scores that would take an hour, of all models or of one."""

OF_PRESETS: Mapping[str, int] = {"vit": 96, "minilm": 96, "lm": 32}
"""Sequences of a set that rules of relevance are compared on: about three forward runs, and one
of the language model, whose sequences hold most tokens."""

NOTES: Mapping[str, tuple[str, ...]] = {
    "vit": ("The sets hold the 200 images for calibration and 184 of those trained on, mixed.",)
}
"""What tables say of single models."""

ZD_VARIANTS: tuple[Mapping[str, Any], ...] = (
    {"both_sides": True},
    {"pooled": False},
    {"both_sides": True, "pooled": False},
    {"threshold": 2.0},
)
"""The ways to count that implementations of ZD differ in, beside that of the paper."""


Builder = Callable[[int], BitScore]


def builders(case: Case) -> dict[str, Builder]:
    """Label -> the score for a seed."""
    found: dict[str, Builder] = {name: _registered(name, case.name) for name in BIT_SCORES}
    found["magnitude"] = lambda _: MagnitudeBits(FORMATS)
    for options in ZD_VARIANTS:
        told = " ".join(f"{name}={value}" for name, value in options.items())
        found[f"zd {told}"] = _zd(options)
    for preset in ("gradient", "relp", "attnlrp", "cp"):
        found[f"relevance preset={preset} draws=1"] = _relevance(case.name, preset, "drawn")
    found["relevance start=logit"] = _relevance(case.name, "gradient", "logit")
    return found


def _registered(name: str, model: str) -> Builder:
    options = _settings(name, model)
    return lambda seed: with_options(bit_score(name, FORMATS, seed=seed), **options)


def _settings(name: str, model: str) -> Mapping[str, int]:
    return SETTINGS.get(f"{model} {name}", SETTINGS.get(name, {}))


def _relevance(model: str, preset: str, start: str) -> Builder:
    return lambda seed: RelevanceBits(
        FORMATS, preset=preset, start=start, sequences=OF_PRESETS[model], draws=1, seed=seed
    )


def _zd(options: Mapping[str, Any]) -> Builder:
    return lambda _: ZdBits(FORMATS, **options)


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

    def figures(self, several: Sequence[Found]) -> tuple[str, str, str]:
        """Spearman, that within a width, and regret, over seeds."""
        measures = (self.truth.rank, self.truth.rank_within, self.truth.regret)
        rank, within, regret = (
            str(interval([measure(one.losses) for one in several])) for measure in measures
        )
        return rank, within, regret


def rows_of(judge: Judge, only: Sequence[str]) -> dict[str, tuple[object, ...]]:
    """Label -> figures of every score."""
    rows: dict[str, tuple[object, ...]] = {}
    for label, build in builders(judge.case).items():
        if only and label not in only:
            continue
        try:
            several = standard(judge.case, build)
        except LamellaError as error:
            logger.warning("%s: no %s: %s", judge.case.name, label, error)
            continue
        # Of several seeds the second one is timed: the first warms everything up.
        times = several[min(1, len(several) - 1)].times
        rows[label] = (*judge.figures(several), several[0].products, times)
        logger.info("%s: %s: %s", judge.case.name, label, rows[label])
    return rows


def standard(case: Case, build: Builder) -> list[Found]:
    """A score from each set of samples, with another seed each time."""
    seeds = _seeds(build(0))
    return [
        found_of(Run.of(case, build(seed), seed), count=seed == 0, time=seed == min(1, seeds - 1))
        for seed in range(seeds)
    ]


def _seeds(score: BitScore) -> int:
    if score.name == "random":
        return RANDOM_SEEDS
    return SETS if score.needs_samples else 1


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
            f"{len(case.unseen)} unseen sequences, scores from {SETS} disjoint sets of "
            f"{SEQUENCES}. Blocks of 64, inputs rounded to 8 bits. Means over sets, each with a "
            f"seed of its own (random: {RANDOM_SEEDS} seeds; without data: once), and [95 % of "
            "sets and of unseen sequences drawn with replacement].",
            "Sequences of a set that are taken: "
            + ", ".join(f"{label} {count}" for label, count in _fewer(case).items())
            + "; others take all. hawq-eigenvalue: at most "
            f"{_settings('hawq-eigenvalue', case.name)['rounds']} rounds of power iteration.",
            "Scores of blocks (lim, zd, luq, owl, ends) and of branches (similarity) are priors: "
            "scaled to [0.1, 1] and multiplied by the relative error of the weight in a width, as "
            "allocate-bits does; hawq multiplies the mean curvature by the squared error, as its "
            "paper does.",
            "Regret: measured loss (single changes, added) of the plans that a score chooses at "
            f"{', '.join(f'{b:g}' for b in BUDGETS)} bits, over that of the best plans, minus 1.",
            "products, time: products of matrices, and time of one core, in those of a forward "
            "run of a whole set in its batches (time from two of them). Rounding all weights takes "
            "time and no products: weight-error does little else.",
            *NOTES.get(case.name, ()),
        ),
    )


def _fewer(case: Case) -> dict[str, int]:
    """Label -> sequences, of scores that take a part of a set."""
    counts = {
        label: Run.taken(build(0))
        for label, build in builders(case).items()
        if build(0).needs_samples
    }
    return {label: count for label, count in counts.items() if count < SEQUENCES}
