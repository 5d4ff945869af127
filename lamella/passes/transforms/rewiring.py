"""Putting rounded weights into a graph: the operators that read codes take over from dense ones."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.quantize import Quantized
from lamella.passes.rounding.base import Rounded
from lamella.passes.sites import Site


def rewire_rounded(graph: Graph, site: Site, rounded: Rounded, *, int8_activations: bool) -> None:
    """Let the readers of a site read what became of its weight.

    Codes are read by operators of few bits, and the weight is forgotten. Columns that are kept
    exactly become a second linear layer whose result is added. A dense weight takes the place of
    the one before.
    """
    if rounded.codes is None:
        assert rounded.dense is not None
        graph.set_weight(site.node, rounded.dense.to(site.dtype))
        return
    codes = _codes(graph, site, rounded.codes)
    grid = (rounded.codes.format.kernel_bits, rounded.codes.format.block)
    beside = None
    if rounded.columns is not None and rounded.exact is not None:
        beside = _columns(graph, site, rounded.columns, rounded.exact)
    for reader in site.readers:
        if reader.target is aten.embedding.default:
            new = _embedding(graph, reader, codes, grid, site)
        else:
            bias = graph.operand(reader, "bias")
            value = graph.operand(reader, "input")
            args = (value, *codes, bias, *grid, int8_activations)
            new = graph.call(lam.linear_nbits.default, *args, before=reader)
            if beside is not None:
                new = _add_columns(graph, reader, new, beside)
        graph.replace(reader, new)
    graph.erase(site.readers)


def _codes(graph: Graph, site: Site, stored: Quantized) -> tuple[Node, Node, Node | None]:
    packed = graph.add_weight(f"{site.weight}_packed", stored.packed)
    scales = graph.add_weight(f"{site.weight}_scales", stored.scales)
    zeros = None
    if stored.zero_points is not None:
        zeros = graph.add_weight(f"{site.weight}_zeros", stored.zero_points)
    return packed, scales, zeros


def _columns(graph: Graph, site: Site, columns: Tensor, exact: Tensor) -> tuple[Node, Node]:
    """Places and values of the columns beside the codes, as weights."""
    places = graph.add_weight(f"{site.weight}_columns", columns)
    return places, graph.add_weight(f"{site.weight}_exact", exact.to(site.dtype))


def _add_columns(graph: Graph, reader: Node, new: Node, beside: tuple[Node, Node]) -> Node:
    places, exact = beside
    value = graph.operand(reader, "input")
    picked = graph.call(aten.index_select.default, value, -1, places, before=reader)
    added = graph.call(aten.linear.default, picked, exact, before=reader)
    return graph.call(aten.add.Tensor, new, added, before=reader)


def _embedding(
    graph: Graph,
    reader: Node,
    codes: tuple[Node, Node, Node | None],
    grid: tuple[int, int],
    site: Site,
) -> Node:
    """Rows of the table, in the dtype that the model goes on with."""
    args = (*codes, graph.operand(reader, "indices"), *grid, site.shape[1])
    rows = graph.call(lam.embedding_nbits.default, *args, before=reader)
    if rows.meta["val"].dtype == site.dtype:
        return rows
    return graph.call(aten.to.dtype, rows, site.dtype, before=reader)
