"""Give every weight a bit width so that the model fits a budget and loses least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lamella.errors import PassError
from lamella.ir.graph import Graph
from lamella.ir.quantize import BITS, SCALE_DTYPES, Format
from lamella.passes.allocation.budget import Budget, Model
from lamella.passes.allocation.knapsack import Option, solve
from lamella.passes.allocation.pricing import (
    Choices,
    Group,
    Pricing,
    bytes_of,
    check,
    price_in_bytes,
    price_in_time,
)
from lamella.passes.analyses.latency import check_sizes
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.scores import bit_score
from lamella.passes.sites import Site, find_sites, tie_groups
from lamella.passes.times import Workload, needed


@dataclass(frozen=True)
class AllocateBits(Transform):
    """Choose a format for every weight: least predicted loss within a budget.

    Solves ``min sum_j s[j, f_j]`` subject to ``sum_j price[j, f_j] <= budget`` exactly, as a
    multiple-choice knapsack; ``s`` is the loss that the score `by` predicts for a group of
    weights in a format, and prices are bytes of the stored codes, scales and zeros, or for a
    budget in milliseconds the measured times of the kernels that read the group. Weights that
    a backend merges (queries, keys and values; gate and up) are one group, and so is a head
    that is tied to an embedding. Nothing is rounded yet: the plan is left on the graph
    (``graph.plan``) for `quantize-weights`.

    Attributes:
        budget: ``4.5`` is bits per weight *including scales and zeros*, averaged over the
            weights that get a format (4 bits in blocks of 32 with float16 scales are 4.5);
            ``30%`` (or 0.3) is a share of the bytes of all weights of the model as it is;
            ``12MB`` is the bytes of all weights afterwards; ``3.2ms`` is the time of a call, for
            which kernels are measured on this machine unless their times are known (an embedding,
            of which a call reads few rows, takes none).
        unit: The unit of a budget that is a plain number: ``ms``, ``MB``, ``bits``, ….
        rows: With a budget in milliseconds, what the call reads: for a language model with a
            past the sequences that each read one token, else the tokens of one input; None means
            1 and 128.
        past: With a budget in milliseconds, tokens in the cache of a language model, 0 for a
            prompt; None means 128.
        choices: Widths to choose from: 2, 4, 8, and 32 for leaving a weight as it is.
        by: Name of the score.
        block: Weights that share a scale: 32, 64 or 128.
        symmetric: No zero points.
        scales: ``"float16"`` or ``"float32"``.
        embedding_min: An embedding never gets fewer bits.
        head_min: The last linear layer before an output never gets fewer bits.
        router_min: A layer that chooses experts never gets fewer bits.
        min_size: Weights with fewer entries stay as they are, outside of the budget in bits.
        seed: Of a score that draws at random.

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
    choices: tuple[int, ...] = (2, 4, 8)
    by: str = "fisher"
    block: int = 32
    symmetric: bool = True
    scales: str = "float16"
    embedding_min: int = 4
    head_min: int = 4
    router_min: int = 8
    min_size: int = 1 << 14
    seed: int = 0

    def __post_init__(self) -> None:
        in_time = Budget.parse(self.budget, self.unit).unit == "seconds"
        check_sizes(self.rows, self.past)
        if not in_time and (self.rows, self.past) != (None, None):
            raise ValueError(
                f"rows and past say what a budget in milliseconds is about, got "
                f"budget={self.budget}"
            )
        if not self.choices or not set(self.choices) <= set(BITS):
            raise ValueError(
                f"choices must be among {', '.join(map(str, BITS))}, got {self.choices}"
            )
        if self.scales not in SCALE_DTYPES:
            raise ValueError(
                f"scales must be one of {', '.join(SCALE_DTYPES)}, got {self.scales!r}"
            )
        if self.min_size < 0:
            raise ValueError(f"min_size must not be negative, got {self.min_size}")
        bit_score(self.by, ())
        self._formats()

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Score, solve, and leave the plan on the graph."""
        sites = [site for site in find_sites(graph) if site.size >= self.min_size]
        if not sites:
            analyses.remark("no weight can be given a width: lower min_size")
            return
        groups = tie_groups(sites)
        choices = [(group, self._allowed(group)) for group in groups]
        pricing = self._pricing(graph, analyses, sites, choices)
        check(Budget.parse(self.budget, self.unit), pricing, choices)
        losses = analyses.get(bit_score(self.by, self._formats(), seed=self.seed))
        options = [
            [Option(_loss(losses.losses, group, f), pricing.price(group, f)) for f in formats]
            for group, formats in choices
        ]
        chosen = solve(options, pricing.room)
        plan = {
            site.weight: formats[index]
            for (group, formats), index in zip(choices, chosen, strict=True)
            for site in group
        }
        graph.plan = plan
        taken = [row[index] for row, index in zip(options, chosen, strict=True)]
        told = _tell(groups, plan, taken, pricing, _model(graph, sites))
        for text in (*losses.remarks, f"{told[0]} ({losses.unit})", told[1]):
            analyses.note(text)

    def _pricing(
        self, graph: Graph, analyses: Analyses, sites: list[Site], choices: Choices
    ) -> Pricing:
        """Prices in the unit of the budget; what is measured for them goes into the report."""
        budget = Budget.parse(self.budget, self.unit)
        if budget.unit != "seconds":
            return price_in_bytes(budget, _model(graph, sites))
        times = needed(analyses.times, "a budget in milliseconds")
        workload = Workload.of(graph, self.rows, self.past)
        pricing = price_in_time(budget, graph, choices, times, workload)
        for text in times.take_notes():
            analyses.note(text)
        for text in times.take_problems():
            analyses.remark(text)
        return pricing

    def _formats(self) -> tuple[Format, ...]:
        dtype = SCALE_DTYPES[self.scales]
        return tuple(
            Format(bits, self.block, self.symmetric, dtype) for bits in sorted(set(self.choices))
        )

    def _allowed(self, group: Group) -> tuple[Format, ...]:
        """The formats that every member may have; the widest if all are too narrow."""
        least = {
            "embedding": self.embedding_min,
            "head": self.head_min,
            "router": self.router_min,
            "linear": 0,
        }
        floor = max(least[site.role] for site in group)
        formats = self._formats()
        return tuple(f for f in formats if f.bits >= floor) or formats[-1:]


def _loss(losses: Mapping[str, Mapping[Format, float]], group: Group, format: Format) -> float:
    missing = [site.weight for site in group if site.weight not in losses]
    if missing:
        raise PassError(f"the score has no loss for {', '.join(missing)}")
    # An estimate may come out slightly negative; no format gains from being coarse.
    return sum(max(losses[site.weight][format], 0.0) for site in group)


def _model(graph: Graph, sites: list[Site]) -> Model:
    total = graph.weight_bytes()
    now = sum(site.size * site.dtype.itemsize for site in sites)
    return Model(sum(site.size for site in sites), total - now, total)


def _tell(
    groups: tuple[Group, ...],
    plan: Mapping[str, Format],
    taken: list[Option],
    pricing: Pricing,
    model: Model,
) -> tuple[str, str]:
    """A sentence about the whole, and a table of the groups."""
    price = sum(option.price for option in taken)
    loss = sum(option.loss for option in taken)
    widths = [plan[group[0].weight].bits for group in groups for _ in group]
    counts = ", ".join(f"{widths.count(bits)} at {bits} bits" for bits in sorted(set(widths)))
    size = sum(bytes_of(group, plan[group[0].weight]) for group in groups) + model.fixed
    summary = (
        f"{len(widths)} weights, {counts}: {pricing.total(price)}{pricing.rest}, {size} bytes "
        f"with the rest; predicted loss {loss:.4g}"
    )
    rows = [
        f"{plan[group[0].weight]}  {pricing.one(option.price)}  loss {option.loss:.3g}  "
        f"{', '.join(site.weight for site in group)}"
        for group, option in zip(groups, taken, strict=True)
    ]
    return summary, "\n".join(rows)
