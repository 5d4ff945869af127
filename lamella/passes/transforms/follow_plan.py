"""Take the formats of weights from a plan that was made before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lamella.errors import PlanError
from lamella.ir.graph import Graph
from lamella.ir.plan import Plan
from lamella.passes.allocation.outcome import fingerprint_of
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.sites import Site, find_sites, tie_groups


@dataclass(frozen=True)
class FollowPlan(Transform):
    """Leave the plan of a file on the graph, for `quantize-weights`.

    A plan is written by `allocate-bits`, by ``lamella pareto``, and into every folder that holds
    weights of few bits; where it names how weights were rounded, `quantize-weights` is told by
    its own options. Weights that the plan doesn't name stay as they are, which is a remark.

    Attributes:
        file: The file, or a folder that was saved with one.

    Raises:
        ValueError: No file is given.
    """

    name: ClassVar[str] = "follow-plan"
    effect: ClassVar[Effect] = Effect.EXACT

    file: str = ""

    def __post_init__(self) -> None:
        if not self.file:
            raise ValueError("file must name a bit plan, as in follow-plan file=plan.json")

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Check that the plan is for this model.

        Raises:
            PlanError: It is missing or malformed, or for another model.
        """
        plan = Plan.read(Path(self.file))
        sites = find_sites(graph)
        _check(plan, sites, self.file)
        if plan.origin.fingerprint and plan.origin.fingerprint != fingerprint_of(graph):
            analyses.remark(
                f"the plan {self.file!r} was made for a model of this architecture with other "
                f"weights; its losses may not hold"
            )
        split = _split_groups(plan, sites)
        if split:
            analyses.remark(
                f"backends can't merge layers that the plan stores in different formats: "
                f"{'; '.join(split)}"
            )
        missing = [site.weight for site in sites if site.weight not in plan.entries]
        if missing:
            analyses.note(f"not in the plan, left as they are: {', '.join(missing)}")
        graph.plan, graph.plan_made = plan.formats, plan
        widths = [entry.format.bits for entry in plan.entries.values()]
        counts = ", ".join(f"{widths.count(bits)} at {bits} bits" for bits in sorted(set(widths)))
        analyses.note(f"{len(widths)} weights, {counts}: {plan.bytes} bytes")


def _check(plan: Plan, sites: Sequence[Site], file: str) -> None:
    """Refuse a plan for another model.

    Raises:
        PlanError: Every weight that is not there, or has another shape, is listed.
    """
    shapes = {site.weight: site.shape for site in sites}
    wrong = [
        f"{name} {list(entry.shape)} ({_found(shapes.get(name))})"
        for name, entry in plan.entries.items()
        if shapes.get(name) != entry.shape
    ]
    if wrong:
        raise PlanError(
            f"the plan {file!r} is for another model, or these weights are quantized already: "
            f"{', '.join(wrong)}"
        )


def _found(shape: tuple[int, int] | None) -> str:
    return "not there" if shape is None else f"here {list(shape)}"


def _split_groups(plan: Plan, sites: Sequence[Site]) -> list[str]:
    """Groups that backends merge, and whose members the plan stores apart."""
    groups = tie_groups([site for site in sites if site.weight in plan.entries])
    return [
        ", ".join(site.weight for site in group)
        for group in groups
        if len({plan.entries[site.weight].format for site in group}) > 1
    ]
