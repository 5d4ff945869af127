"""The whole front of size or time against loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lamella.ir.graph import Graph
from lamella.ir.plan import Plan
from lamella.passes.allocation.budget import Budget
from lamella.passes.allocation.choices import Menu, formats_of
from lamella.passes.allocation.joint import solved_together
from lamella.passes.allocation.knapsack import cheapest
from lamella.passes.allocation.outcome import fingerprint_of, origin_of, plan_of_solution
from lamella.passes.allocation.pricing import Pricing, bytes_of, model_of, pricings_of
from lamella.passes.allocation.problem import Problem, Solution
from lamella.passes.analyses.latency import check_sizes
from lamella.passes.base import Analyses, Analysis
from lamella.passes.scores import bit_score
from lamella.passes.scores.base import BitScoreReport
from lamella.passes.scores.interactions import Interactions
from lamella.passes.scores.target import first_sequences
from lamella.passes.sites import Role, find_sites, tie_groups
from lamella.passes.times import Workload
from lamella.passes.trials import Trials

_FLOORS: Mapping[Role, int] = {"embedding": 4, "head": 4, "router": 8}
_SEQUENCES = 16


@dataclass(frozen=True)
class ParetoPoint:
    """The best plan of one budget.

    Attributes:
        spent: What it takes, in words and in the unit that was asked for.
        bits: Bits per weight that has a format, scales and zeros included.
        bytes: Of all weights of the model.
        milliseconds: Predicted for a call; None where nobody asked.
        predicted: Sum of the losses of the score.
        measured: Of the whole plan on the samples; None without samples.
        plan: The plan.
    """

    spent: str
    bits: float
    bytes: int
    milliseconds: float | None
    predicted: float
    measured: float | None
    plan: Plan = field(repr=False)


@dataclass(frozen=True)
class ParetoReport:
    """The front, the cheapest plan first.

    Attributes:
        by: Name of the score.
        unit: Of the losses that are predicted.
        points: Each loses less than those before it; no plan that costs as little loses less.
    """

    by: str
    unit: str
    points: tuple[ParetoPoint, ...]

    def to_json(self) -> dict[str, Any]:
        """As data for `json.dumps`, with the plans."""
        points = [{**vars(point), "plan": point.plan.to_json()} for point in self.points]
        return {"by": self.by, "unit": self.unit, "points": points}


@dataclass(frozen=True)
class Pareto(Analysis[ParetoReport]):
    """The best plans for budgets from the smallest to the largest that there is, each exact.

    Weights are scored and priced once; the knapsack of `allocate-bits` is solved for evenly
    spaced budgets. Embeddings and heads keep at least 4 bits, routers 8.

    Attributes:
        by: Name of the score.
        choices: As for `allocate-bits`.
        block: As for `allocate-bits`.
        symmetric: As for `allocate-bits`.
        scales: As for `allocate-bits`.
        axis: ``"bytes"``, or ``"time"`` of a call as it is measured on this machine.
        rows: With time, as for `allocate-bits`.
        past: With time, as for `allocate-bits`.
        points: How many budgets; equal plans are one point.
        measure: Measure the loss of every plan, where there are samples.
        min_size: Weights with fewer entries stay as they are.
        seed: Of a score that draws at random.

    Raises:
        ValueError: An option has another value.

    References:
        [Dong2020], section 3.2, for choosing on the front of size against loss.
    """

    name: ClassVar[str] = "pareto"

    by: str = "fisher"
    choices: tuple[int | str, ...] = (2, 4, 8)
    block: int | None = None
    symmetric: bool = True
    scales: str = "float16"
    axis: Literal["bytes", "time"] = "bytes"
    rows: int | None = None
    past: int | None = None
    points: int = 16
    measure: bool = True
    min_size: int = 1 << 14
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"points must be at least 2, got {self.points}")
        if self.min_size < 0:
            raise ValueError(f"min_size must not be negative, got {self.min_size}")
        check_sizes(self.rows, self.past)
        bit_score(self.by, ())
        self._menu()

    def run(self, graph: Graph, analyses: Analyses) -> ParetoReport:
        """Score and price once, then solve for each budget.

        Raises:
            PassError: Times are asked for, and there are none.
        """
        sites = [site for site in find_sites(graph) if site.size >= self.min_size]
        menu = self._menu()
        scores = analyses.get(bit_score(self.by, menu.formats, seed=self.seed))
        if not sites:
            return ParetoReport(self.by, scores.unit, ())
        choices = [(group, menu.allowed(group)) for group in tie_groups(sites)]
        call = Workload.of(graph, self.rows, self.past)
        # How large the budget is makes no difference to prices.
        budget = Budget(1.0, "seconds" if self.axis == "time" else "bits")
        pricings = pricings_of([budget], graph, choices, analyses, call)
        problem = Problem.of(choices, pricings, scores.losses)
        trials = None
        if self.measure and analyses.samples is not None:
            trials = Trials(graph, first_sequences(analyses.samples, _SEQUENCES))
        drawn = _Drawing(graph, scores, trials, fingerprint_of(graph))
        front = _front(problem, self.points, scores.interactions)
        return ParetoReport(self.by, scores.unit, tuple(map(drawn.point, front)))

    def _menu(self) -> Menu:
        return Menu(formats_of(self.choices, self.block, self.symmetric, self.scales), _FLOORS)


def _front(problem: Problem, points: int, interactions: Interactions | None) -> list[Solution]:
    """The distinct solutions of evenly spaced budgets, the cheapest first."""
    options = problem.options
    least = cheapest(options)
    most = sum(min(o, key=lambda one: (one.loss, one.price)).price for o in options)
    rooms = [least + (most - least) * step // (points - 1) for step in range(points)]
    alone = [(room, problem.solve(room)) for room in dict.fromkeys(rooms)]
    found = [solved_together(one, interactions, room) for room, one in alone]
    kept: list[Solution] = []
    for one in found:
        if not kept or one.loss < kept[-1].loss:
            kept.append(one)
    return kept


@dataclass(frozen=True)
class _Drawing:
    """Turns solutions into points."""

    graph: Graph
    scores: BitScoreReport
    trials: Trials | None
    digest: str

    def point(self, solution: Solution) -> ParetoPoint:
        model = model_of(self.graph, [site for group in solution.groups for site in group])
        pairs: Sequence[Any] = list(zip(solution.groups, solution.formats, strict=True))
        stored = sum(bytes_of(group, format) for group, format in pairs)
        pricing = solution.problem.pricings[0]
        spent = pricing.total(solution.price())
        measured = None if self.trials is None else self.trials.loss(solution.plan)
        return ParetoPoint(
            spent,
            8 * stored / max(model.entries, 1),
            stored + model.fixed,
            _milliseconds(pricing, spent),
            solution.loss,
            measured,
            self._plan(solution, spent, measured),
        )

    def _plan(self, solution: Solution, spent: str, measured: float | None) -> Plan:
        told = origin_of(solution, None, self.scores)
        made = plan_of_solution(solution, told, self.digest)
        return made.told(budget=spent, measured=measured)


def _milliseconds(pricing: Pricing, spent: str) -> float | None:
    return float(spent.removesuffix(" ms")) if pricing.budget.unit == "seconds" else None
