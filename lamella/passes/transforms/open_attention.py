"""Attention written out, so that its products and its probabilities are values of the graph."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.ops import aten


@dataclass(frozen=True)
class Opened:
    """One attention after it was written out.

    Attributes:
        query: What is multiplied by the keys.
        key: The keys, not transposed.
        value: The values.
        transposed: The keys as the first product reads them.
        scores: The first product.
        probabilities: The softmax.
        output: The second product.
    """

    query: Node
    key: Node
    value: Node
    transposed: Node
    scores: Node
    probabilities: Node
    output: Node


def closed_because(graph: Graph, node: Node) -> str:
    """Why an attention is left as one operator, or nothing."""
    mask = graph.operand(node, "attn_mask")
    if graph.operand(node, "is_causal"):
        return "it hides later tokens without a mask"
    if graph.operand(node, "enable_gqa"):
        return "groups of heads share keys"
    if mask is not None and not mask.meta["val"].is_floating_point():
        return "its mask is no number to add"
    return "it has dropout" if graph.operand(node, "dropout_p") else ""


def open_attention(graph: Graph, node: Node) -> Opened:
    """``softmax(q k^T / sqrt(d) + mask) v`` in place of `node`, whose `closed_because` is empty."""
    query, key, value = (graph.operand(node, name) for name in ("query", "key", "value"))
    rank = key.meta["val"].ndim
    scale = graph.operand(node, "scale")
    if scale is None:
        scale = 1.0 / math.sqrt(int(query.meta["val"].shape[-1]))
    mask = graph.operand(node, "attn_mask")
    transposed = graph.call(aten.transpose.int, key, rank - 2, rank - 1, before=node)
    scores = graph.call(aten.matmul.default, query, transposed, before=node)
    scaled = graph.call(aten.mul.Tensor, scores, scale, before=node)
    if mask is not None:
        scaled = graph.call(aten.add.Tensor, scaled, mask, before=node)
    probabilities = graph.call(aten.softmax.int, scaled, -1, before=node)
    output = graph.call(aten.matmul.default, probabilities, value, before=node, like=node)
    graph.replace(node, output)
    graph.erase([node])
    return Opened(query, key, value, transposed, scores, probabilities, output)
