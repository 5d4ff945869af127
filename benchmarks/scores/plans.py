"""Why a plan loses more than its score said: single estimates, single losses, all at once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from benchmarks.record import Result
from benchmarks.scores.bits import Judge, builders
from benchmarks.scores.cases import Case
from benchmarks.scores.found import Run, found_of
from benchmarks.scores.judged import Table, drawn, interval
from benchmarks.scores.truth import plan_losses
from lamella.faithfulness import Interval
from lamella.ir.quantize import Format
from lamella.passes.sites import find_sites

logger = logging.getLogger(__name__)

BUDGETS = (3.0, 4.0, 5.0)
SCORES = ("fisher", "relevance", "lim")
"""The first two predict the loss; `lim` only orders."""

MEASURED = "measured singles"


def table(cases: Sequence[Case]) -> Result:
    """A row for each model, budget and score."""
    return Result(
        "scores_plans",
        "Plans by scores: the loss that the score predicts, the measured losses of the single "
        "changes, added, and the measured loss of all changes at once, per token of unseen "
        "sequences",
        (
            "model",
            "bits",
            "plan by",
            "weights at 2 bits",
            "predicted",
            "singles, added",
            "singles at 2 bits",
            "all at once",
        ),
        [row for case in cases for row in _rows(Judge.of(case))],
        (
            "Scores from the first set of samples; lim predicts nothing. Weights at 2 bits: their "
            "share of all weights. All at once: [95 % of unseen sequences drawn with "
            "replacement]. Blocks of 64, inputs rounded to 8 bits.",
        ),
    )


def _rows(judge: Judge) -> Iterator[tuple[object, ...]]:
    build = builders(judge.case)
    scores: dict[str, Table] = {
        name: found_of(Run.of(judge.case, build[name](0), 0)).losses for name in SCORES
    }
    scores[MEASURED] = judge.truth.as_table()
    for budget in BUDGETS:
        for name, losses in scores.items():
            row = _row(judge, losses, budget)
            predicted = "-" if name == "lim" else row[1]
            found = (judge.case.name, budget, name, row[0], predicted, *row[2:])
            logger.info("%s", found)
            yield found


def _row(judge: Judge, losses: Table, budget: float) -> tuple[object, ...]:
    plan, truth = judge.truth.plan(losses, budget), judge.truth.as_table()
    sizes = {site.weight: site.size for site in find_sites(judge.case.graph)}
    narrow = {name for name, f in plan.items() if f.bits == 2}
    weights = drawn(len(judge.measured.tokens))
    together = torch.tensor(plan_losses(judge.measured, plan), dtype=torch.float64)
    joint = weights @ together / (weights @ judge.measured.tokens)
    return (
        f"{sum(sizes[name] for name in narrow) / sum(sizes[name] for name in plan):.0%}",
        _added(losses, plan, plan),
        _added(truth, plan, plan),
        _added(truth, plan, narrow),
        _precise(interval([joint])),
    )


def _precise(found: Interval) -> str:
    return f"{found.mean:.3g} [{found.low:.3g}, {found.high:.3g}]"


def _added(losses: Table, plan: Mapping[str, Format], names: Collection[str]) -> float:
    return sum(losses[name][plan[name]] for name in names)
