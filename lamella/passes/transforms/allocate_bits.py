"""Give every weight a bit width so that the model fits a budget and loses least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lamella.errors import BudgetError, PassError
from lamella.ir.graph import Graph
from lamella.ir.quantize import BITS, SCALE_DTYPES, Format, weight_bytes
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.scores import bit_score
from lamella.passes.sites import Site, find_sites, tie_groups
from lamella.passes.transforms.budget import Budget, Model
from lamella.passes.transforms.knapsack import Option, cheapest, solve

Group = tuple[Site, ...]


@dataclass(frozen=True)
class AllocateBits(Transform):
    """Choose a format for every weight: least predicted loss within a budget.

    Solves ``min sum_j s[j, f_j]`` subject to ``sum_j bytes[j, f_j] <= budget`` exactly, as a
    multiple-choice knapsack; ``s`` is the loss that the score `by` predicts for a group of
    weights in a format, and bytes are those of the stored codes, scales and zeros. Weights that
    a backend merges (queries, keys and values; gate and up) are one group, and so is a head
    that is tied to an embedding. Nothing is rounded yet: the plan is left on the graph
    (``graph.plan``) for `quantize-weights`.

    Attributes:
        budget: ``4.5`` is bits per weight *including scales and zeros*, averaged over the
            weights that get a format (4 bits in blocks of 32 with float16 scales are 4.5);
            ``30%`` (or 0.3) is a share of the bytes of all weights of the model as it is;
            ``12MB`` is the bytes of all weights afterwards.
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
        Budget.parse(self.budget)
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
        allowed = [self._allowed(group) for group in groups]
        budget, model = Budget.parse(self.budget), _model(graph, sites)
        _check(budget, model, groups, allowed)
        losses = analyses.get(bit_score(self.by, self._formats(), seed=self.seed))
        options = [
            [Option(_loss(losses.losses, group, f), _price(group, f)) for f in formats]
            for group, formats in zip(groups, allowed, strict=True)
        ]
        chosen = solve(options, budget.bytes(model))
        plan = {
            site.weight: formats[index]
            for group, formats, index in zip(groups, allowed, chosen, strict=True)
            for site in group
        }
        graph.plan = plan
        taken = [row[index] for row, index in zip(options, chosen, strict=True)]
        for text in (*losses.remarks, *_tell(groups, plan, taken, budget, model, losses.unit)):
            analyses.note(text)

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


def _price(group: Group, format: Format) -> int:
    return sum(weight_bytes(site.shape, format, site.dtype) for site in group)


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


def _check(
    budget: Budget, model: Model, groups: tuple[Group, ...], allowed: list[tuple[Format, ...]]
) -> None:
    """Refuse a budget that can't be met before anything is scored."""
    prices = [
        [Option(0.0, _price(group, f)) for f in formats]
        for group, formats in zip(groups, allowed, strict=True)
    ]
    least = cheapest(prices)
    if least > budget.bytes(model):
        raise BudgetError(
            f"allocate-bits can't meet a budget of {budget}; the smallest that can be met with "
            f"these choices is {budget.text(least, model)}"
        )


def _tell(
    groups: tuple[Group, ...],
    plan: Mapping[str, Format],
    taken: list[Option],
    budget: Budget,
    model: Model,
    unit: str,
) -> tuple[str, str]:
    """A sentence about the whole, and a table of the groups."""
    price = sum(option.price for option in taken)
    loss = sum(option.loss for option in taken)
    widths = [plan[group[0].weight].bits for group in groups for _ in group]
    counts = ", ".join(f"{widths.count(bits)} at {bits} bits" for bits in sorted(set(widths)))
    summary = (
        f"{len(widths)} weights, {counts}: {budget.text(price, model)}, "
        f"{price + model.fixed} bytes with the rest; predicted loss {loss:.4g} ({unit})"
    )
    rows = [
        f"{plan[group[0].weight]}  {option.price:>12} bytes  loss {option.loss:.3g}  "
        f"{', '.join(site.weight for site in group)}"
        for group, option in zip(groups, taken, strict=True)
    ]
    return summary, "\n".join(rows)
