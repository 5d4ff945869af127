"""Attention over batch and heads in one axis, as the operator.

Bloom multiplies queries and keys as ``[batch * heads, sequence, width]``, adds distances
``[batch * heads, 1, sequence]`` (ALiBi), and splits the axis again before the mask and the
softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.symbols import shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class _Flat:
    """``softmax(split(scale q k^T + distances) + mask) v``; all but `distances` have four axes."""

    node: Node
    query: Node
    key: Node
    value: Node
    split: Node
    distances: Node
    mask: Node
    scale: float


def raise_flat_heads(graph: Graph) -> None:
    """Write every such attention of `graph` as `aten.scaled_dot_product_attention`."""
    found = [one for node in graph.find(aten.matmul.default) if (one := _flat(node)) is not None]
    for one in found:
        batch, heads, *_ = ops.bind(one.split)["shape"]
        rows = [batch, heads, 1, -1]
        distances = graph.call(aten.reshape.default, one.distances, rows, before=one.node)
        bias = graph.call(aten.add.Tensor, distances, one.mask, before=one.node)
        operands = (one.query, one.key, one.value, bias)
        attention = graph.call(
            aten.scaled_dot_product_attention.default,
            *operands,
            scale=one.scale,
            before=one.node,
        )
        graph.replace(one.node, attention)
    if found:
        graph.finish()


def _flat(node: Node) -> _Flat | None:
    weights, value = _operands(node, aten.matmul.default)
    scores, dim = _operands(weights, aten.softmax.int)
    split, mask = _operands(scores, aten.add.Tensor)
    added, _ = _operands(split, aten.reshape.default)
    scaled, distances = _operands(added, aten.add.Tensor)
    product, scale = _operands(scaled, aten.mul.Tensor)
    flat_query, turned = _operands(product, aten.matmul.default)
    flat_key, *axes = _operands(turned, aten.transpose.int)
    query, _ = _operands(flat_query, aten.reshape.default)
    key, _ = _operands(flat_key, aten.reshape.default)
    nodes = (query, key, value, split, mask)
    if not all(isinstance(one, Node) and len(shape_of(one)) == 4 for one in nodes):
        return None
    if dim not in (-1, 3) or axes != [1, 2] or not isinstance(scale, float):
        return None
    if not isinstance(distances, Node) or len(shape_of(distances)) != 3:
        return None
    if shape_of(distances)[1] != 1:
        return None
    return _Flat(node, query, key, value, split, distances, mask, scale)


def _operands(node: Any, target: Any) -> tuple[Any, ...]:
    """The operands of a call of `target`; Nones for anything else."""
    found = isinstance(node, Node) and node.target is target and len(node.args) > 1
    return tuple(node.args) if found else (None, None)
