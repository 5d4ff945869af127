"""How many positions a model has: the rows of the tables that it reads by position."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.symbols import shape_of
from lamella.rewrite.incremental.evaluate import Evaluation

aten = torch.ops.aten

_KEEPS_COUNT = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.to.dtype,
        aten.clone.default,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.repeat.default,
        aten.reshape.default,
    }
)
"""Operators after which an index still counts positions, from another number on."""


def positions_limit(graph: Graph, positions: Node, evaluation: Evaluation) -> int | None:
    """How many positions the tables of `graph` hold; None when it reads none by position.

    Args:
        graph: A graph that continues from a cache.
        positions: Its input of positions.
        evaluation: Computes values of `graph`; `positions` are all 1 in it.
    """
    limits: list[int] = []
    for node in graph.nodes:
        index, rows = _lookup(node)
        if index is None or not isinstance(rows, int) or not _counts(index, positions):
            continue
        at_one = int(evaluation.at(index, 1, 0, torch.ones(1, 1, dtype=torch.int64)).max())
        limits.append(rows - (at_one - 1))
    return min(limits, default=None)


def _lookup(node: Node) -> tuple[Node | None, Any]:
    """What a table is read at, and how many rows it has."""
    if node.target is aten.embedding.default:
        bound = ops.bind(node)
        return bound["indices"], shape_of(bound["weight"])[0]
    if node.target is aten.gather.default:
        bound = ops.bind(node)
        return bound["index"], shape_of(bound["self"])[bound["dim"]]
    if node.target is aten.index.Tensor:
        bound = ops.bind(node)
        first, *others = bound["indices"]
        lone = isinstance(first, Node) and not others
        return (first, shape_of(bound["self"])[0]) if lone else (None, None)
    return None, None


def _counts(index: Node, positions: Node) -> bool:
    """Whether an index is the position and a number."""
    while index is not positions:
        source = index.args[0] if index.args else None
        nodes = [n for n in index.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if index.target not in _KEEPS_COUNT or nodes != [source]:
            return False
        assert isinstance(source, Node)
        index = source
    return True
