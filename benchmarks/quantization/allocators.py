"""Ways to spend a number of bytes on the weights of a model, each as a plan."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, weight_bytes
from lamella.passes.base import Analyses
from lamella.passes.scores import score
from lamella.passes.sites import Site, find_sites, tie_groups
from lamella.passes.transforms.allocate_bits import AllocateBits

BLOCK = 32
WIDTHS = (2, 4, 8)
OVERHEAD = 16 / BLOCK
"""Bits per weight that float16 scales add to the width."""

Plan = dict[str, Format]
Group = tuple[Site, ...]


@dataclass(frozen=True)
class Spending:
    """A model, the samples that may be looked at, and the bytes that may be spent.

    Attributes:
        analyses: Of the model on the samples; what it has found serves every number of bytes.
        bits: Bits per weight, without the scales of blocks of `BLOCK`.
    """

    analyses: Analyses = field(repr=False)
    bits: float

    @property
    def graph(self) -> Graph:
        """The model."""
        return self.analyses.graph

    @property
    def groups(self) -> tuple[Group, ...]:
        """The weights, those together that must have one format."""
        return tie_groups(find_sites(self.graph))

    @property
    def room(self) -> int:
        """Bytes of codes and scales."""
        entries = sum(site.size for group in self.groups for site in group)
        return int(entries * (self.bits + OVERHEAD) / 8)

    def filled(self, order: Sequence[Group], low: int, high: int) -> Plan:
        """The low width for all, and the high one for the first of `order` that still fit."""
        plan = {s.weight: Format(low, BLOCK) for group in self.groups for s in group}
        spent = cost(self.groups, plan)
        for group in order:
            wider = {site.weight: Format(high, BLOCK) for site in group}
            more = cost([group], wider) - cost([group], plan)
            if spent + more <= self.room:
                plan |= wider
                spent += more
        return plan

    def widths(self) -> tuple[int, int]:
        """The neighboring widths that a plan with two of them mixes."""
        narrow = cost(self.groups, {s.weight: Format(4, BLOCK) for g in self.groups for s in g})
        return (4, 8) if narrow <= self.room else (2, 4)


def cost(groups: Sequence[Group], plan: Mapping[str, Format]) -> int:
    """Bytes of codes and scales."""
    return sum(weight_bytes(s.shape, plan[s.weight], s.dtype) for group in groups for s in group)


def uniform(spending: Spending) -> Plan:
    """The widest format of a kernel that fits everywhere."""
    formats = [Format(bits, block) for bits in WIDTHS for block in (128, 64, 32)]
    plans = [{s.weight: f for g in spending.groups for s in g} for f in formats]
    fitting = [plan for plan in plans if cost(spending.groups, plan) <= spending.room]
    return fitting[-1] if fitting else plans[0]


def lim_order(spending: Spending) -> Plan:
    """Layer-Wise Quantization: the blocks that change the stream most get the higher width."""
    low, high = spending.widths()
    found = spending.analyses.get(score("lim"))
    importance = found.importance()
    block_of = _blocks(spending.graph)
    rest = [g for g in spending.groups if block_of(g) not in importance]
    blocks = sorted(importance, key=lambda name: -importance[name])
    inside = [g for name in blocks for g in spending.groups if block_of(g) == name]
    # Embedding and head are no blocks; as in the paper they are not lowered first.
    return spending.filled([*rest, *inside], low, high)


def position_rule(spending: Spending) -> Plan:
    """As the mixed types of llama.cpp: head, first and last eighth, every third down and value."""
    low, high = spending.widths()
    block_of = _blocks(spending.graph)
    names = [block.name for block in spending.graph.blocks]
    eighth = max(1, len(names) // 8)
    ends = {*names[:eighth], *names[-eighth:]}
    first = [g for g in spending.groups if block_of(g) is None]
    outer = [g for g in spending.groups if block_of(g) in ends]
    third = [
        group
        for place, name in enumerate(names)
        if place % 3 == 0
        for group in _last_two(spending.groups, name, block_of)
    ]
    order = list(dict.fromkeys([*first, *outer, *third, *spending.groups]))
    return spending.filled(order, low, high)


def at_random(seed: int) -> Callable[[Spending], Plan]:
    """Groups in a random order."""

    def plan(spending: Spending) -> Plan:
        low, high = spending.widths()
        order = list(spending.groups)
        random.Random(seed).shuffle(order)
        return spending.filled(order, low, high)

    return plan


def ours(by: str, **options: Any) -> Callable[[Spending], Plan]:
    """`allocate-bits` with a score; without options what its defaults give."""

    def plan(spending: Spending) -> Plan:
        floors = {"embedding_min": 2, "head_min": 2, "min_size": 0}
        AllocateBits(budget=spending.bits + OVERHEAD, by=by, **floors, **options).run(
            spending.graph, spending.analyses
        )
        return dict(spending.graph.plan)

    return plan


ALLOCATORS: dict[str, Callable[[Spending], Plan]] = {
    "fisher": ours("fisher"),
    "fisher, not measured": ours("fisher", measure=False),
    "fisher, blocks of 32": ours("fisher", block=BLOCK),
    "relevance": ours("relevance"),
    "uniform": uniform,
    "LIM order": lim_order,
    "position rule": position_rule,
    "random order 0": at_random(0),
    "random order 1": at_random(1),
    "random order 2": at_random(2),
}


def _blocks(graph: Graph) -> Callable[[Group], str | None]:
    """Which block a group is read in; None outside of all."""
    inside = {node: block.name for block in graph.blocks for node in block.nodes}
    return lambda group: next((inside[r] for r in group[0].readers if r in inside), None)


def _last_two(
    groups: Sequence[Group], name: str, block_of: Callable[[Group], str | None]
) -> list[Group]:
    """The last layer of each branch of a block: values' output and the way down."""
    return [group for group in groups if block_of(group) == name and len(group) == 1]
