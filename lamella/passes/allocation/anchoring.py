"""A plan is measured; where the loss is not what was predicted, it is scored around once more.

References:
    Losses around a plan instead of around the unchanged model: [Yao2021] solve once; the second
    solution here is taken only when it is measured to lose less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.passes.allocation.problem import Losses, Solution
from lamella.passes.base import Analyses
from lamella.passes.scores.target import first_sequences
from lamella.passes.trials import Trials

TOO_MUCH = 1.5
"""A measured loss above this times the predicted one is scored again."""

SEQUENCES = 16
"""How many sequences measure a plan, and how many others score around it."""


@dataclass(frozen=True)
class Settled:
    """A plan with its measured loss.

    Attributes:
        solution: The plan; its loss is what the first score predicted.
        measured: Mean loss per token on samples that did not score it.
        remarks: What was done.
    """

    solution: Solution
    measured: float
    remarks: tuple[str, ...] = field(default=())


def settled_on(solution: Solution, graph: Graph, analyses: Analyses, unit: str) -> Settled | None:
    """Measure a solution, and solve again around it when it loses more than predicted.

    The second solution minimizes ``KL(plan with j -> f) - KL(plan)``, shifted so that the
    least of a group is 0; all of them are measured on one half of the samples. It is taken when
    the whole loses less on the other half.

    Args:
        solution: Of the problem with predicted losses.
        graph: As it is.
        analyses: Has the samples; without any nothing is measured.
        unit: Of the predictions; when it isn't that of measured losses there is nothing to
            compare, and the plan is only measured.
    """
    if analyses.samples is None:
        return None
    scoring, accepting = _halves(analyses.samples)
    judge = Trials(graph, accepting)
    measured = judge.loss(solution.plan)
    if unit != judge.unit or measured <= TOO_MUCH * solution.loss:
        return Settled(solution, measured)
    ratio = measured / solution.loss if solution.loss > 0 else float("inf")
    told = f"measured {measured:.4g} is {ratio:.3g} times the predicted loss {solution.loss:.4g}"
    again = solution.problem.with_losses(_losses_around(solution, Trials(graph, scoring))).solve()
    loss = judge.loss(again.plan) if again.chosen != solution.chosen else measured
    if loss >= measured:
        kept = f"{told}; scored again around the plan, which stays (a second one: {loss:.4g})"
        return Settled(solution, measured, (kept,))
    # With the losses of the first score, so that those of the report mean one thing.
    taken = Solution(solution.problem, again.chosen)
    changed = sum(a != b for a, b in zip(again.chosen, solution.chosen, strict=True))
    text = f"{told}; scored again around the plan: {changed} groups changed, measured {loss:.4g}"
    return Settled(taken, loss, (text,))


def _halves(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to score on and samples to judge on; the same where there is only one batch."""
    taken = first_sequences(samples, 2 * SEQUENCES)
    if len(taken) < 2:
        return taken, taken
    first, second = taken.batches[::2], taken.batches[1::2]
    return Samples(first, taken.seed), Samples(second, taken.seed)


def _losses_around(solution: Solution, trials: Trials) -> Losses:
    """For each group, what each of its formats loses in the place of the one it has."""
    changes: list[Mapping[str, Format]] = []
    places: list[tuple[int, Format]] = []
    for place, (group, formats) in enumerate(solution.problem.choices):
        for format in formats:
            if format != solution.formats[place]:
                changes.append({site.weight: format for site in group})
                places.append((place, format))
    unchanged = trials.loss(solution.plan)
    around = [{format: unchanged} for format in solution.formats]
    found = trials.losses_around(solution.plan, changes)
    for (place, format), loss in zip(places, found, strict=True):
        around[place][format] = loss
    return [{f: loss - min(losses.values()) for f, loss in losses.items()} for losses in around]
