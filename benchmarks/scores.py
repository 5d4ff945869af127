"""Scores for compression beside the measured loss of each single change.

``python -m benchmarks.scores [--record]``: every weight in 2, 4 and 8 bits and every branch that
can go, on the trained language model and the trained vision transformer.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoTokenizer

import lamella
from benchmarks.bits import calibration
from benchmarks.record import Result
from benchmarks.zoo.digits import digits, digits_vit
from benchmarks.zoo.language_model import language_model, windows
from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, weight_bytes
from lamella.passes.allocation.knapsack import Option, solve
from lamella.passes.base import Analyses
from lamella.passes.scores import BitScore, Score, bit_score, score
from lamella.passes.scores.fisher import Fisher
from lamella.passes.scores.kl import MeasuredKl
from lamella.passes.scores.lrp_qvit import LrpQvit
from lamella.passes.scores.relevance import RelevanceScore
from lamella.passes.scores.relevance_bits import RelevanceBits
from lamella.passes.scores.target import loss_target
from lamella.passes.sites import find_sites
from lamella.passes.transforms.dropping import drop

T = TypeVar("T")

logger = logging.getLogger(__name__)

FORMATS = tuple(Format(bits, 64) for bits in (2, 4, 8))
BUDGETS = (3.0, 4.0, 5.0)
"""Bits per weight, codes only, of the plans whose regret is told."""

SEQUENCES = 16
RANDOM_SEEDS = range(10)
SHARE = 4
"""One in so many branches goes when the regret of an order is told."""

Losses = Mapping[str, Mapping[Format, float]]


@dataclass(frozen=True)
class Case:
    """A trained model, samples for the scores, and others to measure on."""

    name: str
    graph: Graph
    samples: Samples
    test: Samples


def cases() -> list[Case]:
    """The language model and the vision transformer."""
    folder = language_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = list(calibration(windows(tokenizer, "calibration", 128, SEQUENCES)))
    unseen = list(calibration(windows(tokenizer, "selection", 128, 8)))
    images, _ = digits("calibration")
    shown, hidden = ([{"pixel_values": c} for c in images[cut].split(16)] for cut in _CUTS)
    return [
        Case("lm", lamella.capture(folder, seen[0]), Samples.of(seen), Samples.of(unseen)),
        Case("vit", lamella.capture(digits_vit(), shown[0]), Samples.of(shown), Samples.of(hidden)),
    ]


_CUTS = (slice(0, 4 * SEQUENCES), slice(4 * SEQUENCES, 12 * SEQUENCES))


def bit_scores(sequences: int) -> dict[str, list[BitScore]]:
    """Label -> the scores of weights, several where they differ by seed."""
    of: dict[str, list[BitScore]] = {
        "relevance, gradient, drawn labels x4": [RelevanceBits(FORMATS, sequences=sequences)],
    }
    for preset in ("gradient", "relp", "attnlrp", "cp"):
        one = RelevanceBits(FORMATS, preset=preset, sequences=sequences, draws=1)
        of[f"relevance, {preset}, drawn labels x1"] = [one]
    for start in ("logit", "softmax"):
        one = RelevanceBits(FORMATS, start=start, sequences=sequences)
        of[f"relevance, gradient, {start}"] = [one]
    of["lrp-qvit"] = [LrpQvit(FORMATS, sequences)]
    of["fisher, drawn labels x4"] = [Fisher(FORMATS, sequences=sequences)]
    of["fisher, drawn labels x1"] = [Fisher(FORMATS, sequences=sequences, draws=1)]
    for by in ("output-error", "weight-error", "lim", "zd", "size"):
        of[by] = [bit_score(by, FORMATS)]
    of["random, median"] = [bit_score("random", FORMATS, seed=seed) for seed in RANDOM_SEEDS]
    return of


def drop_scores(sequences: int) -> dict[str, list[Score]]:
    """Label -> the scores of branches."""
    of: dict[str, list[Score]] = {}
    for preset, start, baseline in (
        ("cp", "drawn", "mean"),
        ("cp", "drawn", "zero"),
        ("cp", "logit", "mean"),
        ("attnlrp", "drawn", "mean"),
        ("relp", "drawn", "mean"),
        ("gradient", "drawn", "mean"),
        ("gradient", "logit", "mean"),
        ("gradient", "logit", "zero"),
    ):
        one = RelevanceScore("sublayer", preset, start, baseline, sequences)  # type: ignore[arg-type]
        of[f"relevance, {preset}, {start}, b0 = {baseline}"] = [one]
    for by in ("lim", "zd", "size"):
        of[by] = [score(by, "sublayer")]
    of["random, median"] = [score("random", "sublayer", seed=seed) for seed in RANDOM_SEEDS]
    return of


def judge_bits(case: Case, truth: Losses, losses: Losses) -> list[float]:
    """Spearman over all pairs and within each width, and the mean regret of plans."""
    pairs = [(name, f) for name in truth for f in FORMATS]
    found = [_rank(truth, losses, pairs)]
    found += [_rank(truth, losses, [(name, f) for name in truth]) for f in FORMATS]
    sizes = {site.weight: site.shape for site in find_sites(case.graph)}
    return [*found, statistics.mean(_regret(sizes, budget, truth, losses) for budget in BUDGETS)]


def _rank(truth: Losses, losses: Losses, pairs: Sequence[tuple[str, Format]]) -> float:
    return _spearman([truth[n][f] for n, f in pairs], [losses[n][f] for n, f in pairs])


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    if len(set(one)) == 1 or len(set(other)) == 1:
        return 0.0  # A constant orders nothing.
    found: Any = spearmanr(one, other)
    return float(found.statistic)


def _regret(
    sizes: Mapping[str, Sequence[int]], budget: float, truth: Losses, losses: Losses
) -> float:
    """The measured loss of the plan by `losses` over that of the plan by `truth`, minus 1."""
    total = sum(out * width for out, width in sizes.values())
    overhead = FORMATS[0].scale_dtype.itemsize / FORMATS[0].block
    room = int(total * (budget / 8 + overhead))

    def measured(by: Losses) -> float:
        options = [
            [Option(max(by[n][f], 0.0), weight_bytes(sizes[n], f)) for f in FORMATS] for n in sizes
        ]
        plan = zip(sizes, solve(options, room), strict=True)
        return sum(truth[name][FORMATS[index]] for name, index in plan)

    return measured(losses) / measured(truth) - 1.0


def measured_drops(case: Case) -> dict[str, float]:
    """The loss per token without each branch that can go, the others left in."""
    target = loss_target(case.graph)
    name = case.graph.signature.outputs[case.graph.outputs.index(target.node)]

    def rows(graph: Graph, sample: Mapping[str, object]) -> Tensor:
        output = graph(**sample)[name]
        return output.reshape(-1, output.shape[-1])

    references = [rows(case.graph, sample) for sample in case.test]
    found: dict[str, float] = {}
    for place, part in enumerate(case.graph.stream.sublayers):
        if part.droppable:
            edited = case.graph.copy()
            drop(edited, Analyses(edited), [edited.stream.sublayers[place]], [part.name])
            pairs = zip(references, case.test, strict=True)
            total = sum(target.loss(one, rows(edited, sample)) for one, sample in pairs)
            found[part.name] = total / sum(map(len, references))
    return found


def judge_drops(truth: Mapping[str, float], importance: Mapping[str, float]) -> list[float]:
    """Spearman, and the regret of the quarter that goes first (measured one by one)."""
    count = len(truth) // SHARE
    taken = sorted(truth, key=lambda name: importance[name])[:count]
    best = sum(sorted(truth.values())[:count])
    rank = _spearman(list(truth.values()), [importance[name] for name in truth])
    return [rank, sum(truth[name] for name in taken) / best - 1.0]


def _medians(judged: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*judged, strict=True)]


def bits_of(case: Case) -> dict[str, list[float]]:
    """Label -> what `judge_bits` says."""
    measured = Analyses(case.graph, case.test).get(MeasuredKl(FORMATS, sequences=len_of(case.test)))
    count = len_of(case.samples)

    def judged(one: BitScore) -> list[float]:
        found = Analyses(case.graph, case.samples).get(one)
        return judge_bits(case, measured.losses, found.losses)

    return _judged(case.name, bit_scores(count), judged)


def drops_of(case: Case) -> dict[str, list[float]]:
    """Label -> what `judge_drops` says."""
    truth = measured_drops(case)

    def judged(one: Score) -> list[float]:
        found = Analyses(case.graph, case.samples).get(one)
        return judge_drops(truth, found.importance())

    return _judged(case.name, drop_scores(len_of(case.samples)), judged)


def len_of(samples: Samples) -> int:
    """Sequences in all batches."""
    return sum(len(next(iter(batch.values()))) for batch in samples)


def _judged(
    name: str, scores: Mapping[str, Sequence[T]], judged: Callable[[T], list[float]]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for label, several in scores.items():
        started = time.perf_counter()
        found[label] = _medians([judged(one) for one in several])
        logger.info("%s %s: %s in %.1f s", name, label, found[label], time.perf_counter() - started)
    return found


def main() -> None:
    """Measure every single change, then see what each score would have said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="keep the tables as JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    both = cases()
    for result in (bits_table(both), drops_table(both)):
        if options.record:
            result.publish()
        else:
            result.show()


def bits_table(both: Sequence[Case]) -> Result:
    """Scores of weights."""
    found = [bits_of(case) for case in both]
    parts = ("all", *(f"{f.bits} bits" for f in FORMATS), "regret")
    return Result(
        name="scores_bits",
        title=(
            "Scores of weights against the measured loss of each single rounding: Spearman over "
            "all (weight, bits) and within a width, and regret"
        ),
        columns=("score", *(f"{case.name}: {part}" for case in both for part in parts)),
        rows=_rows(found),
        notes=(
            "lm: trained language model, 8 unseen rows of 128 tokens, scores from "
            f"{SEQUENCES} others; vit: trained digits ViT, 128 and {4 * SEQUENCES} images. "
            "Blocks of 64, inputs rounded to 8 bits.",
            f"Regret: measured loss (single changes, added) of the plan that a score chooses at "
            f"{', '.join(f'{b:g}' for b in BUDGETS)} bits, over that of the best plan, minus 1; "
            "mean over the budgets.",
        ),
    )


def drops_table(both: Sequence[Case]) -> Result:
    """Scores of branches."""
    found = [drops_of(case) for case in both]
    return Result(
        name="scores_drops",
        title="Scores of branches against the measured loss without each single one",
        columns=("score", *(f"{c.name}: {part}" for c in both for part in ("Spearman", "regret"))),
        rows=_rows(found),
        notes=(
            f"Regret: measured loss (single changes, added) of the quarter of branches that a "
            "score drops first, over that of the best quarter, minus 1. "
            f"Random: median of {len(RANDOM_SEEDS)} seeds.",
        ),
    )


def _rows(found: Sequence[Mapping[str, list[float]]]) -> list[tuple[object, ...]]:
    return [(label, *(v for one in found for v in one[label])) for label in found[0]]


if __name__ == "__main__":
    main()
