"""What is read of experts, channels and weights: a sum for each, over all rows.

All sums are in float64 and linear in the rows, so that they add up over batches in any cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.kinds import LAYERS
from lamella.ir.ops import aten, lam
from lamella.ir.reach import base_name
from lamella.passes.parts import Parts, find_parts
from lamella.passes.relevance.ledger import widened
from lamella.passes.relevance.request import Tap, relevance_of

Pair = tuple[Any, Any]


def channel_taps(graph: Graph) -> list[Tap]:
    """Flow and mass of the channels of every hidden layer; ``channel.<node>``.

    Those of experts are ``[2, experts, channels]``.
    """
    return [_tap_of_channels(one) for one in find_parts(graph) if one.kind == "channel"]


def expert_taps(graph: Graph) -> list[Tap]:
    """Flow and mass of what every expert adds; ``expert.<node>``, ``[2, experts]``."""
    return [_tap_of_experts(one) for one in find_parts(graph) if one.kind == "expert"]


def weight_taps(graph: Graph) -> list[Tap]:
    """What the rows of every weight add, and their coefficients; ``weight.<node>``."""
    return [_tap_of_weight(node) for node in weight_readers(graph)]


def weight_readers(graph: Graph) -> list[Node]:
    """The layers and embeddings that read a weight of the model, and no bias that is computed."""
    found: list[Node] = []
    for node in graph.nodes:
        if base_name(node) in LAYERS or node.target is aten.embedding.default:
            bound = ops.bind(node)
            weight, bias = bound.get("weight"), bound.get("bias")
            if weight is not None and all(n is None or n.op == "get_attr" for n in (weight, bias)):
                found.append(node)
    return found


def _tap_of_channels(parts: Parts) -> Tap:
    name, axis, experts = f"channel.{parts.node.name}", parts.axis, parts.experts
    if experts is None:
        return Tap(name, (parts.node.name,), lambda pair: _along(_relevance(pair), axis))
    count = experts.count
    return Tap(
        name,
        (parts.node.name, experts.offsets.name),
        lambda pair, offsets: _by_expert(_relevance(pair), offsets[0], count),
    )


def _tap_of_experts(parts: Parts) -> Tap:
    assert parts.experts is not None
    count = parts.experts.count

    def amounts(pair: Pair, offsets: Pair) -> Any:
        return aten.sum.dim_IntList(_by_expert(_relevance(pair), offsets[0], count), [2])

    return Tap(f"expert.{parts.node.name}", (parts.node.name, parts.experts.offsets.name), amounts)


def _tap_of_weight(node: Node) -> Tap:
    """``sum y M`` and ``sum M`` by row of the weight, ``[2, rows]`` or ``[2, experts, rows]``.

    ``<W_i, (x^T M)_i> = sum y_i M_i - b_i sum M_i`` needs no product of matrices.
    """
    name, bound = f"weight.{node.name}", ops.bind(node)
    rows = int(bound["weight"].meta["val"].shape[0])
    if node.target is aten.embedding.default:
        nodes = (node.name, bound["indices"].name)
        return Tap(name, nodes, lambda pair, ids: _by_entry(pair, ids[0], rows))
    if node.target is lam.grouped_linear.default:
        nodes = (node.name, bound["offsets"].name)
        return Tap(name, nodes, lambda pair, ends: _rows_by_expert(pair, ends[0], rows))
    axis = -1 if "linear" in base_name(node) else 1 - node.meta["val"].ndim
    return Tap(name, (node.name,), lambda pair: _rows_along(pair, axis))


def _relevance(pair: Pair) -> Any:
    return relevance_of(*map(widened, pair))


def _along(relevance: Any, axis: int) -> Any:
    """Flow and mass by place along an axis, ``[2, size]``."""
    return aten.stack.default(
        [_sum_but(part, axis) for part in (relevance, aten.abs.default(relevance))]
    )


def _sum_but(value: Any, axis: int) -> Any:
    """The sum over all axes but one that is counted from the end."""
    others = [other for other in range(value.ndim) if other != value.ndim + axis]
    return aten.sum.dim_IntList(value, others)


def _rows_along(pair: Pair, axis: int) -> Any:
    return aten.stack.default([_sum_but(_relevance(pair), axis), _sum_but(widened(pair[1]), axis)])


def _by_expert(rows: Any, offsets: Any, count: int) -> Any:
    """Flow and mass of rows by expert, ``[2, experts, width]``."""
    owners = _owners(rows, offsets, count)
    parts = rows, aten.abs.default(rows)
    return aten.stack.default([aten.matmul.default(owners, part) for part in parts])


def _rows_by_expert(pair: Pair, offsets: Any, count: int) -> Any:
    owners = _owners(pair[0], offsets, count)
    parts = _relevance(pair), widened(pair[1])
    return aten.stack.default([aten.matmul.default(owners, part) for part in parts])


def _owners(rows: Any, offsets: Any, count: int) -> Any:
    """One where a row is an expert's, else zero, ``[experts, rows]``; sorted by expert."""
    places = aten.arange.start_step(0, rows.shape[0], 1, dtype=torch.int64)
    past = aten.reshape.default(places, [1, -1]) >= aten.reshape.default(offsets, [-1, 1])
    owner = aten.sum.dim_IntList(aten.to.dtype(past, torch.int64), [0], True)
    experts = aten.arange.start_step(0, count, 1, dtype=torch.int64)
    found = aten.eq.Tensor(owner, aten.reshape.default(experts, [-1, 1]))
    return aten.to.dtype(found, torch.float64)


def _by_entry(pair: Pair, indices: Any, rows: int) -> Any:
    """The same of an embedding, by the entry that was read; it has no bias."""
    relevance = _relevance(pair)
    flows = aten.sum.dim_IntList(relevance, [relevance.ndim - 1])
    none = aten.full.default([rows], 0.0, dtype=torch.float64)
    places = aten.reshape.default(indices, [-1])
    found = aten.scatter_add.default(none, 0, places, aten.reshape.default(flows, [-1]))
    return aten.stack.default([found, none])
