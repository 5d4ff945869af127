"""A graph whose weights are stored as a plan says, with made-up codes: to be timed, not used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.quantize import Format
from lamella.passes.sites import Site, find_sites
from lamella.tuning.chain import MadeUp

MIN_SIZE = 1 << 14
"""Smaller weights stay as they are where no plan is given."""


def uniform(graph: Graph, format: Format) -> Mapping[str, Format]:
    """A plan that gives every weight of some size one format."""
    return {site.weight: format for site in find_sites(graph) if site.size >= MIN_SIZE}


def stand_in(graph: Graph, plan: Mapping[str, Format], made_up: MadeUp) -> Graph:
    """A copy of `graph` that takes as long as if its weights had been rounded.

    Rounding searches for scales, which takes longer than lowering the graph; kernels take the
    same time whatever the codes are.
    """
    twin = graph.copy()
    for site in find_sites(twin):
        format = plan.get(site.weight)
        if format is not None and format.bits != 32:
            _store(twin, site, format, made_up)
    twin.finish()
    return twin


def _store(graph: Graph, site: Site, format: Format, made_up: MadeUp) -> None:
    outputs, inputs = site.shape
    blocks, bits = -(-inputs // format.block), format.kernel_bits
    codes: tuple[Node, Node, Node | None] = (
        graph.add_weight(
            f"{site.weight}_packed", made_up.codes(outputs, blocks, format.block * bits // 8)
        ),
        graph.add_weight(
            f"{site.weight}_scales", made_up.numbers(outputs, blocks, dtype=format.scale_dtype)
        ),
        None
        if format.symmetric
        else graph.add_weight(
            f"{site.weight}_zeros", made_up.codes(outputs, -(-blocks * bits // 8))
        ),
    )
    for reader in site.readers:
        if reader.target is aten.embedding.default:
            new = _rows(graph, reader, codes, format, site)
        else:
            args = (graph.operand(reader, "input"), *codes, graph.operand(reader, "bias"))
            target = lam.linear_nbits.default
            new = graph.call(target, *args, bits, format.block, True, before=reader, like=reader)
        graph.replace(reader, new)
    graph.erase(site.readers)


def _rows(
    graph: Graph,
    reader: Node,
    codes: tuple[Node, Node, Node | None],
    format: Format,
    site: Site,
) -> Node:
    indices = graph.operand(reader, "indices")
    args = (*codes, indices, format.kernel_bits, format.block, site.shape[1])
    rows = graph.call(lam.embedding_nbits.default, *args, before=reader)
    if rows.meta["val"].dtype == site.dtype:
        return rows
    return graph.call(aten.to.dtype, rows, _dtype(reader), before=reader)


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype
