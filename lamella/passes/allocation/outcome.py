"""What came out of an allocation: as sentences for the report, and as a plan."""

from __future__ import annotations

from dataclasses import replace

from lamella.ir.graph import Graph
from lamella.ir.plan import Plan, PlanEntry, PlanOrigin, fingerprint
from lamella.passes.allocation.anchoring import Settled
from lamella.passes.allocation.decisions import summary_of, table_of
from lamella.passes.allocation.pricing import bytes_of, model_of
from lamella.passes.allocation.problem import Solution
from lamella.passes.scores.base import BitScoreReport
from lamella.passes.sites import find_sites


def told_of(
    solution: Solution, settled: Settled | None, graph: Graph, unit: str
) -> tuple[str, ...]:
    """A sentence about the whole, what was measured, and a table of the groups."""
    pairs = list(zip(solution.groups, solution.formats, strict=True))
    model = model_of(graph, [site for group in solution.groups for site in group])
    size = sum(bytes_of(group, format) for group, format in pairs) + model.fixed
    measured = "" if settled is None else f", measured {settled.measured:.4g}"
    again = () if settled is None else settled.remarks
    return (f"{summary_of(solution, size)} ({unit}){measured}", *again, table_of(solution))


def origin_of(solution: Solution, settled: Settled | None, scores: BitScoreReport) -> PlanOrigin:
    """Where the plan comes from, without the fingerprint of the weights."""
    return PlanOrigin(
        score=scores.by,
        unit=scores.unit,
        budget=", ".join(str(pricing.budget) for pricing in solution.problem.pricings),
        predicted=solution.loss,
        measured=None if settled is None else settled.measured,
    )


def plan_of_solution(solution: Solution, origin: PlanOrigin, digest: str) -> Plan:
    """The plan with the loss and the bytes of every weight.

    Args:
        solution: What was chosen.
        origin: Where it comes from.
        digest: The `fingerprint_of` the graph.
    """
    entries: dict[str, PlanEntry] = {}
    for place, (group, format) in enumerate(zip(solution.groups, solution.formats, strict=True)):
        loss = solution.options[place].loss
        for site in group:
            size = bytes_of((site,), format)
            entries[site.weight] = PlanEntry(format, site.shape, size, place, loss)
    return Plan(entries, replace(origin, fingerprint=digest))


def fingerprint_of(graph: Graph) -> str:
    """The fingerprint of the weights that can be stored in few bits; reads them one by one."""
    sites = sorted(find_sites(graph), key=lambda site: site.weight)
    return fingerprint((site.weight, graph.weight(site.node)) for site in sites)
