"""Give every weight a bit width so that the model fits a budget and loses least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from lamella.ir.graph import Graph
from lamella.passes.allocation.anchoring import settled_on
from lamella.passes.allocation.budget import Budget
from lamella.passes.allocation.choices import Menu, formats_of
from lamella.passes.allocation.joint import solved_together
from lamella.passes.allocation.outcome import (
    fingerprint_of,
    origin_of,
    plan_of_solution,
    told_of,
)
from lamella.passes.allocation.pricing import check, pricings_of
from lamella.passes.allocation.problem import Problem
from lamella.passes.analyses.latency import check_sizes
from lamella.passes.analyses.spikes import Spikes
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.scores import bit_score
from lamella.passes.sites import Role, find_sites, tie_groups
from lamella.passes.times import Workload

_NONE: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class AllocateBits(Transform):
    """Choose a format for every weight: least predicted loss within a budget.

    Solves ``min sum_j s[j, f_j]`` subject to ``sum_j price[j, f_j] <= budget`` exactly for every
    budget, as a multiple-choice knapsack; ``s`` is the loss that the score `by` predicts for a
    group of weights in a format, and prices are bytes of the stored codes, scales and zeros, or
    for a budget in milliseconds the measured times of the kernels that read the group. Weights that
    a backend merges (queries, keys and values; gate and up) are one group, and so is a head
    that is tied to an embedding. Where the score knows what weights lose together (`fisher`),
    formats are then exchanged as long as the loss of all of them at once falls. Nothing is
    rounded yet: the plan is left on the graph (``graph.plan``) for `quantize-weights`.

    Attributes:
        budget: ``4.5`` is bits per weight *including scales and zeros*, averaged over the
            weights that get a format (4 bits in blocks of 32 with float16 scales are 4.5);
            ``30%`` (or 0.3) is a share of the bytes of all weights of the model as it is;
            ``12MB`` is the bytes of all weights afterwards; ``3.2ms`` is the time of a call, for
            which kernels are measured on this machine unless their times are known (an embedding,
            of which a call reads few rows, takes none). Several stand with commas between them,
            times of a language model with the call they are of and its tokens:
            ``12MB, 3ms decode, 40ms prefill=512``.
        unit: The unit of a budget that is a plain number: ``ms``, ``MB``, ``bits``, ….
        rows: With a budget in milliseconds, what the call reads: for a language model with a
            past the sequences that each read one token, else the tokens of one input; None means
            1 and 128.
        past: With a budget in milliseconds, tokens in the cache of a language model, 0 for a
            prompt; None means 128.
        choices: Widths to choose from: 2, 4, 8, and 32 for leaving a weight as it is; 3, 5 and 6
            are held in the next width that has a kernel. A width may say its block, and that it
            has zero points: ``4/128``, ``2/32z``.
        by: Name of the score.
        block: Weights that share a scale, where a choice doesn't say: 32, 64, 128 or 256;
            None chooses among the first three for every weight.
        symmetric: No zero points, where a choice doesn't say.
        scales: ``"float16"`` or ``"float32"``.
        embedding_min: An embedding never gets fewer bits.
        head_min: The last linear layer before an output never gets fewer bits.
        router_min: A layer that chooses experts never gets fewer bits.
        spiky_min: A layer whose input has spikes on some tokens (see `spikes`) never gets fewer
            bits; 0 doesn't look.
        min_size: Weights with fewer entries stay as they are, outside of the budget in bits.
        seed: Of a score that draws at random.
        measure: Measure the loss of the plan on the samples, where there are any; if it is more
            than half above the prediction, score all groups once more around the plan, solve
            again, and keep what loses less on samples that were not scored.
        write: A file to write the plan to, for `follow-plan`.

    Raises:
        ValueError: An option has another value.

    References:
        [Yao2021], for the integer program.
    """

    name: ClassVar[str] = "allocate-bits"
    effect: ClassVar[Effect] = Effect.EXACT

    budget: float | str = 4.5
    unit: str = ""
    rows: int | None = None
    past: int | None = None
    choices: tuple[int | str, ...] = (2, 4, 8)
    by: str = "fisher"
    block: int | None = None
    symmetric: bool = True
    scales: str = "float16"
    embedding_min: int = 4
    head_min: int = 4
    router_min: int = 8
    spiky_min: int = 0
    min_size: int = 1 << 14
    seed: int = 0
    measure: bool = True
    write: str = ""

    def __post_init__(self) -> None:
        times = [one for one in self._budgets() if one.unit == "seconds" and not one.phase]
        check_sizes(self.rows, self.past)
        if not times and (self.rows, self.past) != (None, None):
            raise ValueError(
                f"rows and past say what a budget in milliseconds is about, got "
                f"budget={self.budget}"
            )
        if self.min_size < 0:
            raise ValueError(f"min_size must not be negative, got {self.min_size}")
        bit_score(self.by, ())
        self._menu()

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Score, solve, measure, and leave the plan on the graph."""
        sites = [site for site in find_sites(graph) if site.size >= self.min_size]
        if not sites:
            analyses.remark("no weight can be given a width: lower min_size")
            return
        menu = self._menu(self._spiky(analyses))
        choices = [(group, menu.allowed(group)) for group in tie_groups(sites)]
        call = Workload.of(graph, self.rows, self.past)
        pricings = pricings_of(self._budgets(), graph, choices, analyses, call)
        check(pricings, choices)
        scores = analyses.get(bit_score(self.by, menu.formats, seed=self.seed))
        alone = Problem.of(choices, pricings, scores.losses).solve()
        solution = solved_together(alone, scores.interactions)
        settled = settled_on(solution, graph, analyses, scores.unit) if self.measure else None
        final = solution if settled is None else settled.solution
        graph.plan = final.plan
        for text in (*scores.remarks, *told_of(final, settled, graph, scores.unit)):
            analyses.note(text)
        origin = origin_of(final, settled, scores)
        graph.plan_made = plan_of_solution(final, origin, fingerprint_of(graph))
        if self.write:
            graph.plan_made.write(Path(self.write))

    def _budgets(self) -> tuple[Budget, ...]:
        return Budget.parse_all(self.budget, self.unit)

    def _spiky(self, analyses: Analyses) -> Mapping[str, int]:
        """Weights that stay wide because of their inputs, each said in the report."""
        if not self.spiky_min:
            return {}
        reasons = analyses.get(Spikes()).reasons()
        for name, reason in reasons.items():
            analyses.note(f"{name} gets at least {self.spiky_min} bits: {reason}")
        return dict.fromkeys(reasons, self.spiky_min)

    def _menu(self, frozen: Mapping[str, int] = _NONE) -> Menu:
        floors: dict[Role, int] = {
            "embedding": self.embedding_min,
            "head": self.head_min,
            "router": self.router_min,
        }
        formats = formats_of(self.choices, self.block, self.symmetric, self.scales)
        return Menu(formats, floors, frozen)
