"""A plan is measured; where the loss is not what was predicted, it is scored around once more.

References:
    Losses around a plan instead of around the unchanged model: [Yao2021] solve once; the second
    solution here is taken only when it is measured to lose less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.passes.allocation.problem import Losses, Problem, Solution
from lamella.passes.base import Analyses
from lamella.passes.scores.target import first_sequences
from lamella.passes.trials import Trials

TOO_MUCH = 1.5
"""A measured loss above this times the predicted one is scored again."""

_PENALTY = 10.0

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
    """Measure a solution beside those without the narrowest widths, and take the best.

    Losses of single weights don't add up where many are rounded coarsely, so that a plan without
    the narrowest width can be better than the one that is predicted to be. When what is taken
    still loses half more than predicted, all groups are scored once more around it: the second
    solution minimizes ``KL(plan with j -> f) - KL(plan)``, shifted so that the least of a group
    is 0, with one block of each width measured. Scoring and judging happen on different halves
    of the samples.

    Args:
        solution: Of the problem with predicted losses.
        graph: As it is.
        analyses: Has the samples; without any nothing is measured.
        unit: Of the predictions; when it isn't that of measured losses there is nothing to
            compare, and nothing is scored again.
    """
    if analyses.samples is None:
        return None
    scoring, accepting = _halves(analyses.samples)
    judge = Trials(graph, accepting)
    found = _wider(Settled(solution, judge.loss(solution.plan)), judge)
    predicted = found.solution.loss
    if unit != judge.unit or found.measured <= TOO_MUCH * predicted:
        return found
    ratio = found.measured / predicted if predicted > 0 else float("inf")
    told = f"measured {found.measured:.4g} is {ratio:.3g} times the predicted loss {predicted:.4g}"
    if _has_blocks(found.solution.problem):
        told += " (of a width one block is measured again, the others follow as predicted)"
    losses = _losses_around(found, Trials(graph, scoring))
    again = Solution(solution.problem, solution.problem.with_losses(losses).solve().chosen)
    loss = judge.loss(again.plan) if again.chosen != found.solution.chosen else found.measured
    if loss >= found.measured:
        text = f"{told}; scored again around the plan, which stays (a second one: {loss:.4g})"
        return replace(found, remarks=(*found.remarks, text))
    pairs = zip(again.chosen, found.solution.chosen, strict=True)
    changed = sum(one != other for one, other in pairs)
    text = f"{told}; scored again around the plan: {changed} groups changed, measured {loss:.4g}"
    return Settled(again, loss, (*found.remarks, text))


def _wider(first: Settled, judge: Trials) -> Settled:
    """The best of a solution and those that do without the narrowest widths."""
    problem = first.solution.problem
    found = first
    for least in sorted({f.bits for _, formats in problem.choices for f in formats})[1:]:
        other = _at_least(problem, least)
        if other is None or other.chosen == first.solution.chosen:
            continue
        measured = judge.loss(other.plan)
        if measured < found.measured:
            text = (
                f"a plan without fewer than {least} bits measures {measured:.4g}, the one that "
                f"was predicted to lose least {first.measured:.4g}"
            )
            found = Settled(other, measured, (text,))
    return found


def _at_least(problem: Problem, bits: int) -> Solution | None:
    """The best solution without narrower formats; None where the budgets don't allow it."""
    most = sum(max(losses.values()) for losses in problem.losses) or 1.0
    penalized = [
        {f: loss + (_PENALTY * most if f.bits < bits else 0.0) for f, loss in losses.items()}
        for losses in problem.losses
    ]
    chosen = problem.with_losses(penalized).solve().chosen
    found = Solution(problem, chosen)
    return found if min(f.bits for f in found.formats) >= bits else None


def _halves(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to score on and samples to judge on; the same where there is only one batch."""
    taken = first_sequences(samples, 2 * SEQUENCES)
    if len(taken) < 2:
        return taken, taken
    first, second = taken.batches[::2], taken.batches[1::2]
    return Samples(first, taken.seed), Samples(second, taken.seed)


def _losses_around(settled: Settled, trials: Trials) -> Losses:
    """For each group, what each of its formats loses in the place of the one it has.

    One block of every width is measured. What another block of that width would lose more or
    less is as predicted, times what the plan was measured to lose over what was predicted.
    """
    solution = settled.solution
    places = list(zip(solution.problem.choices, solution.formats, strict=True))
    measured = [_one_of_each_width(formats, taken) for (_, formats), taken in places]
    changes = [
        {site.weight: format for site in group}
        for ((group, _), taken), formats in zip(places, measured, strict=True)
        for format in formats
        if format != taken
    ]
    unchanged = trials.loss(solution.plan)
    found = iter(trials.losses_around(solution.plan, changes))
    scale = settled.measured / solution.loss if solution.loss > 0 else 1.0
    around: list[dict[Format, float]] = []
    for (_, taken), formats, predicted in zip(
        places, measured, solution.problem.losses, strict=True
    ):
        known = {f: unchanged if f == taken else next(found) for f in formats}
        losses = _extended(known, predicted, scale)
        around.append({f: loss - min(losses.values()) for f, loss in losses.items()})
    return around


def _one_of_each_width(formats: Sequence[Format], taken: Format) -> list[Format]:
    """The format that is taken, and of other widths the one most like it."""
    alike = sorted(formats, key=lambda f: (f != taken, f.block != taken.block))
    return list({f.bits: f for f in reversed(alike)}.values())


def _extended(
    known: Mapping[Format, float], predicted: Mapping[Format, float], scale: float
) -> dict[Format, float]:
    """The losses of all formats from those of one of each width."""
    of_width = {format.bits: format for format in known}
    nearest = {format: of_width[format.bits] for format in predicted}
    return {f: known[n] + scale * (predicted[f] - predicted[n]) for f, n in nearest.items()}


def _has_blocks(problem: Problem) -> bool:
    """Whether a group may have several formats of one width."""
    return any(len({f.bits for f in formats}) < len(formats) for _, formats in problem.choices)
