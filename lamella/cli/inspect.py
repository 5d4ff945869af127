"""``lamella inspect``: what a model consists of, and what it costs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lamella.cli.console import Stages, errors_in_one_line, out, show_json, table_of
from lamella.cli.lazy import api, cost, ops
from lamella.rendering import bytes_text

if TYPE_CHECKING:
    from lamella.ir.graph import Graph
    from lamella.passes.analyses.cost import CostAt


@errors_in_one_line()
def inspect_model(
    model: Annotated[
        str, typer.Argument(help="Model folder, hub id, .onnx or .pt2 file.", show_default=False)
    ],
    graph: Annotated[bool, typer.Option("--graph", help="Print every operation.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Batch that the cost is given for.")] = 1,
    sequence: Annotated[int, typer.Option(min=1, help="Sequence that it is given for.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show the blocks, operators and cost of a model."""
    with Stages() as stage:
        stage("reading the model")
        captured = api.capture(model)
    if graph:
        out.print(str(captured), markup=False, soft_wrap=True)
        return
    report = api.analyze(captured, cost.Cost())
    sizes = {s: batch if s.startswith("batch") else sequence for s in report.symbols}
    counted = report.at(**sizes)
    if as_json:
        show_json(_data(captured, counted))
        return
    out.print(_summary(captured, counted))
    out.print(_blocks(captured, counted))
    out.print(_operators(captured))
    for remark in captured.stream.remarks:
        out.print(f"note: {remark}", style="dim", markup=False)


def _summary(graph: Graph, counted: CostAt) -> Table:
    table = Table(box=None, show_header=False, title=graph.origin.architecture or "model")
    table.title_justify = "left"
    total = counted.total
    sizes = ", ".join(f"{name} {size}" for name, size in counted.sizes.items())
    rows = {
        "inputs": ", ".join(graph.signature.inputs),
        "outputs": ", ".join(graph.signature.outputs),
        "operations": f"{sum(_operator_counts(graph).values()):,}",
        "weights": f"{bytes_text(total.stored_bytes)} in {len(graph.weight_nodes()):,} tensors",
        f"at {sizes}" if sizes else "one call": f"{total.flops / 1e9:,.2f} GFLOP, activations "
        f"{bytes_text(counted.peak_activation_bytes)} at the peak, cache "
        f"{bytes_text(total.cache_bytes)}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _blocks(graph: Graph, counted: CostAt) -> Table:
    figures = ("weights", "share", "GFLOP")
    table = table_of("\nblocks", "name", "sublayers", *figures, numbers=figures)
    whole = max(counted.total.stored_bytes, 1)
    for block in graph.blocks:
        numbers = counted.per_block[block.name]
        table.add_row(
            block.name,
            " + ".join(sublayer.kind for sublayer in block.sublayers),
            bytes_text(numbers.stored_bytes),
            f"{numbers.stored_bytes / whole:.1%}",
            f"{numbers.flops / 1e9:,.3f}",
        )
    return table


def _operators(graph: Graph) -> Table:
    table = table_of("\noperators", "name", "count", numbers=("count",))
    for name, count in _operator_counts(graph).most_common():
        table.add_row(name, str(count))
    return table


def _data(graph: Graph, counted: CostAt) -> dict[str, Any]:
    blocks = [
        {
            "name": block.name,
            "sublayers": [{"name": s.name, "kind": s.kind} for s in block.sublayers],
            "cost": dataclasses.asdict(counted.per_block[block.name]),
        }
        for block in graph.blocks
    ]
    return {
        "architecture": graph.origin.architecture,
        "inputs": graph.signature.inputs,
        "outputs": graph.signature.outputs,
        "sizes": dict(counted.sizes),
        "total": dataclasses.asdict(counted.total),
        "peak_activation_bytes": counted.peak_activation_bytes,
        "blocks": blocks,
        "operators": dict(_operator_counts(graph).most_common()),
        "remarks": graph.stream.remarks,
    }


def _operator_counts(graph: Graph) -> Counter[str]:
    calls = (node for node in graph.nodes if node.op == "call_function")
    return Counter(ops.op_name(node.target) for node in calls)
