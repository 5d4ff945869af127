"""What is read from values and coefficients: sums that are small, taken at once.

All sums are in float64 and over single rows or over everything, so that they add up over
batches in any cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.stream import Sublayer
from lamella.passes.parts import attends
from lamella.passes.relevance.ledger import widened
from lamella.passes.relevance.request import Tap, relevance_of

Pair = tuple[Any, Any]


def amounts_of(pair: Pair) -> Any:
    """Flow and mass, ``[2]``."""
    relevance = relevance_of(*map(widened, pair))
    sums = aten.sum.default(relevance), aten.sum.default(aten.abs.default(relevance))
    return aten.stack.default(list(sums))


def amounts_by_head(pair: Pair) -> Any:
    """Flow and mass of each head of ``[batch, heads, sequence, width]``, ``[2, heads]``."""
    relevance = relevance_of(*map(widened, pair))
    others = [axis for axis in range(relevance.ndim) if axis != relevance.ndim - 3]
    parts = relevance, aten.abs.default(relevance)
    return aten.stack.default([aten.sum.dim_IntList(part, others) for part in parts])


def branch_and_shortcut(joined: Pair, branch: Pair, shortcut: Pair) -> Any:
    """Sums over rows of ``|<branch, M>|`` and ``|<shortcut, M>|``, and flow and mass; ``[4]``.

    `M` is the coefficient of the sum, which is that of the branch before anything else that
    reads it is counted.
    """
    parts = [relevance_of(widened(pair[0]), widened(joined[1])) for pair in (branch, shortcut)]
    rows = [_by_row(part) for part in parts]
    effects = [aten.sum.default(aten.abs.default(row)) for row in rows]
    flow, mass = aten.sum.default(parts[0]), aten.sum.default(aten.abs.default(parts[0]))
    return aten.stack.default([*effects, flow, mass])


def _by_row(relevance: Any) -> Any:
    return aten.sum.dim_IntList(relevance, list(range(1, relevance.ndim)))


def operation_taps(graph: Graph) -> list[Tap]:
    """Flow and mass of every value that may carry relevance; ``operation.<node>``."""
    return [
        Tap(f"operation.{node.name}", (node.name,), amounts_of)
        for node in graph.nodes
        if node.op in ("call_function", "placeholder") and is_float(node)
    ]


def block_taps(graph: Graph) -> list[Tap]:
    """Flow and mass behind every block; ``block.<index>``."""
    return [Tap(f"block.{block.index}", (block.exit.name,), amounts_of) for block in graph.blocks]


def sublayer_taps(graph: Graph) -> list[Tap]:
    """Every branch beside its shortcut; ``sublayer.<index>``."""
    return [
        Tap(f"sublayer.{part.index}", _nodes_of(part), branch_and_shortcut)
        for part in graph.stream.sublayers
    ]


def _nodes_of(part: Sublayer) -> tuple[str, ...]:
    return part.add.name, part.branch.name, part.shortcut.name


def head_taps(graph: Graph) -> list[Tap]:
    """Every attention whose heads are an axis; ``heads.<node>``."""
    return [
        Tap(f"heads.{node.name}", (node.name,), amounts_by_head)
        for node in graph.nodes
        if attends(node)
    ]


def is_float(node: Node) -> bool:
    """Whether a node computes one tensor of floating-point numbers."""
    value = node.meta.get("val")
    facts = ops.facts(node.target) if node.op == "call_function" else None
    is_made = facts is not None and facts.category == "creation"
    return isinstance(value, Tensor) and value.dtype in _FLOATS and not is_made


_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
