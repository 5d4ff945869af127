"""From what a relevance graph gave to a report."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import op_name
from lamella.passes.analyses.relevance_report import (
    Amounts,
    BlockRelevance,
    HeadsRelevance,
    OperationRelevance,
    PartsRelevance,
    RelevanceReport,
    SublayerRelevance,
    WeightRelevance,
)
from lamella.passes.parts import PartKind, Parts, find_parts
from lamella.passes.relevance.folding import fold_batch_norms
from lamella.passes.relevance.part_taps import weight_readers
from lamella.passes.relevance.relevance_graph import RelevanceGraph

Totals = dict[str, Tensor]


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
        experts=_parts(graph, means, "expert"),
        channels=_parts(graph, means, "channel"),
        weights=_weights(graph, made, means),
        pixels={
            name: means[f"pixels.{name}"] for name in made.sources if f"pixels.{name}" in means
        },
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
    cut = find_parts(graph) if _any(means, "heads") else ()
    found: list[HeadsRelevance] = []
    for node in graph.nodes:
        sums = means.get(f"tap.heads.{node.name}")
        if sums is not None and node.name in reached:
            heads = tuple(Amounts(flow, mass) for flow, mass in sums.T.tolist())
            shared = _shared(cut, node)
            found.append(HeadsRelevance(node.name, blocks.get(node.name, ""), heads, shared))
    return tuple(found)


def _shared(cut: Iterable[Parts], node: Node) -> int:
    """How many heads share keys and values."""
    counts = {one.kind: one.count for one in cut if one.node is node}
    return counts.get("head", 1) // counts.get("head-group", 1)


def _any(means: Totals, kind: str) -> bool:
    return any(name.startswith(f"tap.{kind}.") for name in means)


def _parts(graph: Graph, means: Totals, kind: PartKind) -> tuple[PartsRelevance, ...]:
    if not _any(means, kind):
        return ()
    found: list[PartsRelevance] = []
    for one in find_parts(graph):
        if one.kind == kind:
            flow, mass = means[f"tap.{kind}.{one.node.name}"]
            found.append(PartsRelevance(one.name, one.node.name, flow, mass))
    return tuple(found)


# ---- weights ----------------------------------------------------------------------------


def _weights(graph: Graph, made: RelevanceGraph, means: Totals) -> tuple[WeightRelevance, ...]:
    """Every weight once, with what all its readers make of it."""
    if not _any(means, "weight"):
        return ()
    rows: dict[str, Tensor] = {}
    readers = weight_readers(graph)
    folded = graph
    if any(node.name in made.replaced for node in readers):
        folded = graph.copy()
        fold_batch_norms(folded)
    layers = {node.name: node for node in folded.nodes}
    for node in readers:
        flow, coefficient = means[f"tap.weight.{node.name}"]
        layer = layers[made.replaced.get(node.name, node.name)]
        bias = ops.bind(layer).get("bias")
        if bias is not None:
            flow = flow - folded.weight(bias).double() * coefficient
        weight = str(ops.bind(node)["weight"].target)
        rows[weight] = rows[weight] + flow if weight in rows else flow
    return tuple(WeightRelevance(name, flows) for name, flows in rows.items())
