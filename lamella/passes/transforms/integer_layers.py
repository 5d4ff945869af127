"""Which linear layers multiply 8-bit integers by 8-bit integers, and how their inputs are rounded.

A layer qualifies when its weight is stored in 8 bits without zero points, when only linear layers
read it, and when it sees many rows: then multiplying takes longer than reading the weight, and
the kernels of integers are the fastest there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import Node

from lamella.ir.axes import merged_batch, sizes_with
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.quantize import Format, Integers
from lamella.ir.reducers import MaxAbs, RoundingVariance
from lamella.ir.runner import Request
from lamella.passes.base import Analyses
from lamella.passes.sites import Site
from lamella.passes.times import needed
from lamella.passes.transforms.measured_layers import not_faster

ACTIVATIONS = ("none", "int8", "int8-rows", "int8-tensor")
"""How the inputs of linear layers may be rounded."""

TOKENS = 128
"""What a size that is not the batch counts as: the usual length of a sentence."""

SPREAD = 8.0
"""With one scale for all rows, the largest square of an entry may be this multiple of the mean
over rows. One scale gives codes to the range that is there, a scale per row to both signs alike,
so that one scale is as exact up to a multiple of about 4; at 8 nothing is lost that can be
measured on a sentence encoder (mean cosine 0.9974 instead of 0.9975), and at 16 a lot (0.993)."""


def integer_layers(
    graph: Graph,
    analyses: Analyses,
    formats: Mapping[Site, Format],
    options: tuple[str, int | None],
) -> Mapping[Site, bool]:
    """The sites that become `lamella::linear_int8` -> whether each row has a scale of its own.

    Args:
        graph: The graph.
        analyses: Told which layers stay, and why.
        formats: What every site would be stored in.
        options: Which of `ACTIVATIONS`, and the least number of rows; None measures which
            kernel is faster.

    Raises:
        PassError: Kernels are to be measured, and nobody measures.
    """
    activations, min_rows = options
    slow: frozenset[str] = frozenset()
    if min_rows is None:
        times = needed(analyses.times, "quantize-weights with measure=true")
        slow = not_faster(graph, times, formats, per_row=activations == "int8-rows")
    sizes, chosen = _Sizes(merged_batch(graph)), list[Site]()
    refused: dict[str, list[str]] = {}
    for site, format in formats.items():
        reason = _refusal(site, format, min(map(sizes.rows, site.readers)), min_rows or 0)
        if reason is None and site.weight in slow:
            reason = "measured to be no faster"
        if reason is None:
            chosen.append(site)
        else:
            refused.setdefault(reason, []).append(site.weight)
    for reason, names in refused.items():
        analyses.note(f"without integer products ({reason}): {', '.join(names)}")
    if not chosen:
        analyses.remark(
            "no linear layer multiplies integers: give weights 8 bits without zero points, or "
            "lower min_rows"
        )
    if activations != "int8" or analyses.samples is None:
        return dict.fromkeys(chosen, activations != "int8-tensor")
    return _by_spread(chosen, analyses)


def rewire(graph: Graph, site: Site, stored: Integers, per_row: bool) -> None:
    """Let the linear layers of a site read integers, and forget the weight."""
    codes = graph.add_weight(f"{site.weight}_codes", stored.codes)
    scales = graph.add_weight(f"{site.weight}_scales", stored.scales)
    for reader in site.readers:
        bias = graph.operand(reader, "bias")
        args = (graph.operand(reader, "input"), codes, scales, bias, per_row)
        graph.replace(reader, graph.call(lam.linear_int8.default, *args, before=reader))
    graph.erase(site.readers)


def _refusal(site: Site, format: Format, rows: float, min_rows: int) -> str | None:
    """Why a site stays as it is stored."""
    if any(reader.target is not aten.linear.default for reader in site.readers):
        return "an embedding reads the weight"
    if site.role == "router":
        return "it chooses experts"
    if format.bits != 8 or not format.symmetric:
        return f"stored in {format}"
    return f"fewer than {min_rows} rows" if rows < min_rows else None


@dataclass(frozen=True)
class _Sizes:
    """Sizes of the graph with one input in the batch, of `TOKENS` tokens.

    Attributes:
        merged: Every symbol of a batch -> the one that stands for all.
    """

    merged: Mapping[sympy.Symbol, sympy.Symbol]

    def rows(self, layer: Node) -> float:
        """How many rows a linear layer sees; none for an embedding."""
        if layer.target is not aten.linear.default:
            return 0
        *leading, _ = sizes_with(layer.all_input_nodes[0], self.merged)
        size: Any = sympy.prod(leading)
        batch = set(self.merged.values())
        return float(size.xreplace({s: 1 if s in batch else TOKENS for s in size.free_symbols}))


def _by_spread(chosen: list[Site], analyses: Analyses) -> Mapping[Site, bool]:
    """Whether the rows of the inputs differ so much that each needs a scale."""
    wanted = {
        (site, reader): (
            Request.of(MaxAbs(), reader.all_input_nodes[0]),
            Request.of(RoundingVariance(site.shape[1]), reader.all_input_nodes[0]),
        )
        for site in chosen
        for reader in site.readers
    }
    known = analyses.statistics([r for pair in wanted.values() for r in pair])
    per_row = dict.fromkeys(chosen, False)
    for (site, _), (largest, variance) in wanted.items():
        square = float(known[largest].max()) ** 2
        mean_square = float(known[variance].max()) * 12 * 127**2
        per_row[site] |= square > SPREAD * mean_square
    count = sum(per_row.values())
    analyses.note(
        f"inputs are rounded with a scale per row in {count} layers, with one scale in "
        f"{len(chosen) - count}"
    )
    return per_row
