"""Products of rows that are sorted by expert: `lamella.grouped_linear`."""

from __future__ import annotations

import torch
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.rewrite.canonical.contractions import turn_weight

aten = torch.ops.aten
lam = torch.ops.lamella

# By name: transformers defines its operator when its modeling code is imported.
_GROUPED = frozenset({"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"})


def raise_grouped_linears(graph: Graph) -> int:
    """``grouped_mm(x, w, offsets) -> grouped_linear(x, transpose(w), offsets)``; how many.

    Where `w` is a transposed weight itself, the two cancel. A weight that only such products
    read becomes its transposed view, and the origin remembers it.
    """
    products = [node for node in graph.nodes if _is_grouped(node)]
    for node in products:
        x, w, offsets = node.args[:3]
        with graph.author("raise_grouped_linears"):
            turned = graph.call(aten.transpose.int, w, 1, 2, before=node)
            made = graph.call(
                lam.grouped_linear.default, x, turned, offsets, before=node, like=node
            )
            graph.replace(node, made)
    turned_weights = _turn_weights(graph)
    if products or turned_weights:
        graph.prune()
    return len(products) + turned_weights


def _is_grouped(node: Node) -> bool:
    if node.op != "call_function" or ops.op_name(node.target) not in _GROUPED:
        return False
    extra = [*node.args[3:], *node.kwargs.values()]
    return len(node.args) >= 3 and all(value is None for value in extra)


def _turn_weights(graph: Graph) -> int:
    count = 0
    for weight in graph.weight_nodes():
        turns = list(weight.users)
        if turns and all(_is_only_for_experts(turn) for turn in turns):
            turn_weight(graph, weight)
            for turn in turns:
                graph.replace(turn, weight)
            count += 1
    return count


def _is_only_for_experts(turn: Node) -> bool:
    if turn.target is not aten.transpose.int or turn.args[1:] != (1, 2):
        return False
    return all(
        user.target is lam.grouped_linear.default and user.args[1] is turn for user in turn.users
    )
