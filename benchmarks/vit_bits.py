"""Mixed widths of weights and activations on the trained vision transformer, as an emulation.

``python -m benchmarks.vit_bits [--budgets 3 4] [--attention 8 4] [--measured] [--record]``

Uniform widths beside plans by LRP-QViT's share of relevance, by the default score, by others and at
random, at equal average bits, on digits that took no part in training or in calibration.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import lamella
from benchmarks.record import Result
from benchmarks.zoo.digits import digits, digits_vit
from lamella.data import Samples
from lamella.faithfulness.intervals import Interval, bootstrap
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.ir.reducers import divergence
from lamella.passes.allocation.knapsack import Option, solve
from lamella.passes.base import Analyses
from lamella.passes.scores import bit_score
from lamella.passes.sites import Site, find_sites, tie_groups
from lamella.passes.transforms.quantize_activations import QuantizeActivations

logger = logging.getLogger(__name__)

WIDTHS = (2, 3, 4, 5, 6, 8)
FORMATS = tuple(Format(bits) for bits in WIDTHS)
SCORES = ("lrp-qvit", "fisher", "relevance", "weight-error")
RANDOM_SEEDS = range(5)
BUDGETS = (3, 4)
ATTENTION = (8, 4)

MEASURED = "each group measured"
_TRUTH = (
    "Each group measured: KL on the calibration images with that group alone rounded, its input "
    "included; what a score would have to guess.",
)

Plan = Mapping[str, Format]
Losses = Mapping[str, Mapping[Format, float]]


@dataclass(frozen=True)
class Case:
    """The model, images to calibrate with, others to measure on, and what the model says there."""

    graph: Graph
    analyses: Analyses
    images: Tensor
    labels: Tensor
    reference: Tensor

    @property
    def right(self) -> Tensor:
        """Whether the model itself is right, for each image."""
        return (self.reference.argmax(-1) == self.labels).double()


@dataclass(frozen=True)
class Measured:
    """One plan on the held-out images, image by image.

    Attributes:
        right: 1 where the class is right.
        divergence: ``KL(model || rounded model)`` in nats.
    """

    right: Tensor
    divergence: Tensor


def case() -> Case:
    """The vision transformer, 200 images for calibration and 397 others."""
    shown, _ = digits("calibration")
    images, labels = digits("test")
    samples = Samples.of([{"pixel_values": chunk} for chunk in shown.split(50)])
    graph = lamella.capture(digits_vit(), next(iter(samples)))
    return Case(graph, Analyses(graph, samples), images, labels, _logits(graph, images))


def uniform(graph: Graph, bits: int) -> Plan:
    """Every linear layer at one width."""
    return {site.weight: Format(bits) for site in find_sites(graph)}


def plan_of(graph: Graph, losses: Losses, bits: int) -> Plan:
    """The widths of least predicted loss at `bits` on average over all weights."""
    sites = find_sites(graph)
    groups = tie_groups(sites)
    options = [[_option(losses, group, f) for f in FORMATS] for group in groups]
    chosen = solve(options, bits * sum(site.size for site in sites))
    return {
        site.weight: FORMATS[index]
        for group, index in zip(groups, chosen, strict=True)
        for site in group
    }


def _option(losses: Losses, group: Sequence[Site], format: Format) -> Option:
    loss = sum(max(losses[site.weight][format], 0.0) for site in group)
    return Option(loss, format.bits * sum(site.size for site in group))


def measured_losses(one: Case) -> Losses:
    """The divergence on the calibration images when one group alone is rounded, with its inputs."""
    samples = one.analyses.need_samples()
    images = torch.cat([batch["pixel_values"] for batch in samples])
    reference = _logits(one.graph, images)
    found: dict[str, dict[Format, float]] = {}
    for group in tie_groups(find_sites(one.graph)):
        for format in FORMATS:
            plan = {site.weight: format for site in group}
            logits = _logits(rounded(one, plan, attention=32), images)
            loss = float(divergence(reference, logits).mean())
            for site in group:
                found.setdefault(site.weight, {})[format] = loss / len(group)
    return found


def rounded(one: Case, plan: Plan, attention: int) -> Graph:
    """A copy of the model that follows a plan."""
    edited = one.graph.copy()
    edited.plan = dict(plan)
    change = QuantizeActivations(attention_bits=attention)
    change.run(edited, Analyses(edited, one.analyses.need_samples()))
    edited.finish()
    return edited


def measured(one: Case, plan: Plan, attention: int) -> Measured:
    """A plan on the held-out images."""
    logits = _logits(rounded(one, plan, attention), one.images)
    right = (logits.argmax(-1) == one.labels).double()
    return Measured(right, divergence(one.reference, logits))


def plans(one: Case, bits: int, *, truth: Losses | None) -> Iterator[tuple[str, list[Plan]]]:
    """Label -> plans of `bits` on average; several where seeds differ."""
    for by in SCORES:
        losses = one.analyses.get(bit_score(by, FORMATS)).losses
        yield by, [plan_of(one.graph, losses, bits)]
    drawn = [one.analyses.get(bit_score("random", FORMATS, seed=s)).losses for s in RANDOM_SEEDS]
    yield f"random, {len(drawn)} seeds", [plan_of(one.graph, found, bits) for found in drawn]
    if truth is not None:
        yield MEASURED, [plan_of(one.graph, truth, bits)]


def rows_of(
    one: Case, bits: int, attention: int, truth: Losses | None = None
) -> list[tuple[object, ...]]:
    """The rows of one budget: uniform first, then the plans beside it."""
    base = measured(one, uniform(one.graph, bits), attention)
    rows = [_row(one, f"uniform W{bits}A{bits}", base, base, (bits, attention))]
    for label, several in plans(one, bits, truth=truth):
        found = [measured(one, plan, attention) for plan in several]
        mean = Measured(
            torch.stack([m.right for m in found]).mean(0),
            torch.stack([m.divergence for m in found]).mean(0),
        )
        rows.append(_row(one, label, mean, base, (bits, attention)))
        logger.info("%s", rows[-1])
    return rows


def _row(
    one: Case, label: str, found: Measured, base: Measured, widths: tuple[int, int]
) -> tuple[object, ...]:
    return (
        *widths,
        label,
        str(bootstrap(found.right)),
        "" if found is base else _signed(bootstrap(found.right - base.right)),
        str(bootstrap(found.divergence)),
        "" if found is base else _signed(bootstrap(found.divergence - base.divergence)),
    )


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _logits(graph: Graph, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([graph(pixel_values=chunk)["logits"] for chunk in images.split(100)])


def result(one: Case, rows: Sequence[Sequence[object]]) -> Result:
    """The table."""
    told = _TRUTH if any(row[2] == MEASURED for row in rows) else ()
    return Result(
        name="vit_bits",
        title=(
            f"Widths of weights and activations on the trained digits ViT, emulated: accuracy and "
            f"KL on {len(one.labels)} unseen images (fp32: {bootstrap(one.right)})"
        ),
        columns=(
            "average bits",
            "attention bits",
            "plan",
            "accuracy",
            "minus uniform",
            "KL",
            "minus uniform",
        ),
        rows=rows,
        notes=(
            "No kernel runs these formats: values are rounded to those of so many codes. Weights "
            "have a range per output, inputs one range, norms are reparameterized, probabilities "
            "of attention are powers of the root of two; the patch embedding stays in float32.",
            f"Mixed plans choose among {', '.join(map(str, WIDTHS))} bits, for a weight and its "
            "input alike, at the same average over weights as the uniform row; scores and ranges "
            "saw 200 calibration images, plans were fixed before these images.",
            *told,
            "Brackets: 95 % bootstrap intervals over images; differences are paired.",
        ),
    )


def main() -> None:
    """Measure every plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=int, nargs="*", default=list(BUDGETS))
    parser.add_argument("--attention", type=int, nargs="*", default=list(ATTENTION))
    parser.add_argument("--measured", action="store_true", help="also measure each group alone")
    parser.add_argument("--record", action="store_true", help="keep the table as JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    one = case()
    truth = measured_losses(one) if options.measured else None
    rows = [
        row
        for attention in options.attention
        for bits in options.budgets
        for row in rows_of(one, bits, attention, truth)
    ]
    found = result(one, rows)
    if options.record:
        found.publish()
    else:
        found.show()


if __name__ == "__main__":
    main()
