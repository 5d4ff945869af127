"""What every operation, block, branch and head contributes to the output, over the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lamella.errors import SamplesError
from lamella.ir.graph import Graph
from lamella.ir.ops import op_name
from lamella.passes.analyses.relevance_report import (
    Amounts,
    BlockRelevance,
    HeadsRelevance,
    OperationRelevance,
    RelevanceReport,
    SublayerRelevance,
)
from lamella.passes.base import Analyses, Analysis
from lamella.passes.relevance import taps
from lamella.passes.relevance.emit import LABEL, RelevanceGraph, emit
from lamella.passes.relevance.request import Request, Tap
from lamella.passes.relevance.seeds import parse_seed
from lamella.rules.relevance.presets import Preset, preset_of

_TAPS = {
    "operations": taps.operation_taps,
    "blocks": taps.block_taps,
    "sublayers": taps.sublayer_taps,
    "heads": taps.head_taps,
}

Totals = dict[str, Tensor]


@dataclass(frozen=True)
class Relevance(Analysis[RelevanceReport]):
    """Layer-wise relevance propagation over the samples: one forward and one sweep each.

    Tokens that an attention mask hides start nothing. Amounts are summed in float64 in the order
    of the samples; how they are cut into batches makes no difference beyond rounding.

    Attributes:
        preset: Name of the rules, or a preset.
        seed: Where relevance starts: ``"logit"`` (the largest, at every position), ``"logit:7"``,
            ``"contrastive"``, ``"softmax"``, ``"difference:7,9"``.
        position: The only position of the output that counts; None means all.
        labels: The class of every row of the samples, which takes the place of the largest.
        output: Name of the output that is explained; "" means the first.
        taps: What is told: ``"operations"``, ``"blocks"``, ``"sublayers"``, ``"heads"``.
        ledger: Whether to account for what is lost, by cause.

    Raises:
        ValueError: The preset, the seed or a tap is unknown.

    References:
        `methods/relevance.md`, sections 6 and 7.1.
    """

    name: ClassVar[str] = "relevance"

    preset: str | Preset = "cp"
    seed: str = "logit"
    position: int | None = None
    labels: tuple[int, ...] = ()
    output: str = ""
    taps: tuple[str, ...] = ("operations", "blocks", "sublayers", "heads")
    ledger: bool = False

    def __post_init__(self) -> None:
        preset_of(self.preset)
        parse_seed(self.seed)
        unknown = [name for name in self.taps if name not in _TAPS]
        if unknown:
            raise ValueError(f"unknown taps {', '.join(unknown)}; known are {', '.join(_TAPS)}")

    def run(self, graph: Graph, analyses: Analyses) -> RelevanceReport:
        """Emit the relevance graph and run the samples through it.

        Raises:
            SamplesError: There are no samples, or not as many labels as rows.
            MissingRuleError: Some operators have no rule.
            GraphError: The output doesn't depend on an input that relevance can be asked for.
        """
        samples = analyses.need_samples()
        made = emit(graph, preset_of(self.preset), self._request(graph))
        totals: Totals = {}
        rows = 0
        for sample in samples:
            given, count = self._with_labels(sample, graph, rows)
            found: dict[str, Tensor] = made.graph(**given)
            rows += count
            _add_up(totals, found)
        if self.labels and rows != len(self.labels):
            raise SamplesError(f"there are {len(self.labels)} labels for {rows} rows of samples")
        if not rows:
            raise SamplesError("there are no samples; give at least one input dict")
        means = {name: total / rows for name, total in totals.items()}
        return report_of(graph, made, means, self._named(rows))

    def _named(self, rows: int) -> tuple[str, int]:
        return preset_of(self.preset).name, rows

    def _request(self, graph: Graph) -> Request:
        wanted: list[Tap] = []
        for name in self.taps:
            wanted += _TAPS[name](graph)
        seed = parse_seed(self.seed, self.position)
        output = self.output or 0
        return Request(output, seed, bool(self.labels), True, tuple(wanted), self.ledger)

    def _with_labels(
        self, sample: Mapping[str, Any], graph: Graph, start: int
    ) -> tuple[dict[str, Any], int]:
        """The inputs by name, and how many rows they have."""
        flat = graph.signature.flatten((), sample)
        given: dict[str, Any] = dict(zip(graph.signature.inputs, flat, strict=True))
        first = next(value for value in flat if isinstance(value, Tensor) and value.ndim)
        count = len(first)
        if self.labels:
            labels = self.labels[start : start + count]
            if len(labels) != count:
                raise SamplesError(
                    f"there are {len(self.labels)} labels, and more rows of samples than that"
                )
            given[LABEL] = torch.tensor(labels)
        return given, count


def _add_up(totals: Totals, found: Mapping[str, Tensor]) -> None:
    """Add what one batch gave; of the relevance of inputs only flow and mass."""
    for name, value in found.items():
        if name.startswith("relevance."):
            wide = value.double()
            amounts = torch.stack((wide.sum(), wide.abs().sum()))
        elif name == "start" or name.startswith(("tap.", "ledger.")):
            amounts = value.double()
        else:
            continue
        totals[name] = totals[name] + amounts if name in totals else amounts


def report_of(
    graph: Graph, made: RelevanceGraph, means: Totals, named: tuple[str, int]
) -> RelevanceReport:
    """A report of what a relevance graph gave.

    Args:
        graph: Of the model.
        made: The relevance graph, with the taps of this analysis.
        means: ``"start"``, ``"tap.…"`` and ``"ledger.…"`` as it gives them, in float64 and over
            the rows, and flow and mass of each ``"relevance.<input>"``.
        named: Name of the preset, and how many rows there were.
    """
    start = means["start"]
    inputs = {name: _amounts(means[f"relevance.{name}"]) for name in made.sources}
    ledger: dict[str, float] = {}
    closure = 0.0
    if made.ledger:
        leaks = means["ledger.leaks"]
        for entry, leak in zip(made.ledger, leaks.tolist(), strict=True):
            ledger[entry.cause] = ledger.get(entry.cause, 0.0) + leak
        closure = float((start - means["ledger.inputs"].sum() - leaks.sum()) / start.abs())
    return RelevanceReport(
        preset=named[0],
        rows=named[1],
        start=float(start),
        inputs=inputs,
        operations=_operations(graph, made, means),
        blocks=_blocks(graph, made, means),
        sublayers=_sublayers(graph, made, means),
        heads=_heads(graph, made, means),
        ledger=ledger,
        closure=closure,
    )


def _amounts(pair: Tensor) -> Amounts:
    flow, mass = pair.tolist()
    return Amounts(flow, mass)


def _reached(made: RelevanceGraph) -> frozenset[str]:
    """The nodes that have a coefficient, by their names in the model's graph."""
    reached = frozenset(made.reached)
    return reached | {old for old, new in made.replaced.items() if new in reached}


def _block_names(graph: Graph) -> dict[str, str]:
    return {node.name: block.name for block in graph.blocks for node in block.nodes}


def _operations(
    graph: Graph, made: RelevanceGraph, means: Totals
) -> tuple[OperationRelevance, ...]:
    reached, blocks = _reached(made), _block_names(graph)
    return tuple(
        OperationRelevance(
            node.name,
            op_name(node.target),
            blocks.get(node.name, ""),
            _amounts(means[f"tap.operation.{node.name}"]),
        )
        for node in graph.nodes
        if f"tap.operation.{node.name}" in means and node.name in reached
    )


def _blocks(graph: Graph, made: RelevanceGraph, means: Totals) -> tuple[BlockRelevance, ...]:
    reached = _reached(made)
    added = {part.index: part.amounts.flow for part in _sublayers(graph, made, means)}
    return tuple(
        BlockRelevance(
            block.index,
            block.name,
            _amounts(means[f"tap.block.{block.index}"]) if block.exit.name in reached else None,
            sum(added.get(part.index, 0.0) for part in block.sublayers),
        )
        for block in graph.blocks
        if f"tap.block.{block.index}" in means
    )


def _sublayers(graph: Graph, made: RelevanceGraph, means: Totals) -> tuple[SublayerRelevance, ...]:
    reached = _reached(made)
    found: list[SublayerRelevance] = []
    for part in graph.stream.sublayers:
        sums = means.get(f"tap.sublayer.{part.index}")
        if sums is None or part.add.name not in reached:
            continue
        effect, other, flow, mass = sums.tolist()
        share = effect / (effect + other) if effect + other else 0.0
        amounts = Amounts(flow, mass)
        found.append(SublayerRelevance(part.index, part.name, part.kind, amounts, effect, share))
    return tuple(found)


def _heads(graph: Graph, made: RelevanceGraph, means: Totals) -> tuple[HeadsRelevance, ...]:
    reached, blocks = _reached(made), _block_names(graph)
    found: list[HeadsRelevance] = []
    for node in graph.nodes:
        sums = means.get(f"tap.heads.{node.name}")
        if sums is not None and node.name in reached:
            heads = tuple(Amounts(flow, mass) for flow, mass in sums.T.tolist())
            found.append(HeadsRelevance(node.name, blocks.get(node.name, ""), heads))
    return tuple(found)
