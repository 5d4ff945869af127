"""Batch norms folded into the convolutions before them.

Rules that treat positive and negative contributions apart see other contributions before and
after folding; published results are for folded networks.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.ops import aten


def fold_batch_norms(graph: Graph) -> dict[str, str]:
    """Fold, in place, every batch norm that is the only reader of a convolution.

    Returns:
        Names of a norm and of the convolution before it -> name of the convolution that stands
        for both.
    """
    replaced: dict[str, str] = {}
    for norm in graph.find(aten.batch_norm.default):
        layer = graph.operand(norm, "input")
        if _is_convolution(layer) and len(layer.users) == 1 and not graph.operand(norm, "training"):
            folded = _folded(graph, layer, norm)
            replaced |= {norm.name: folded.name, layer.name: folded.name}
            graph.replace(norm, folded)
    if replaced:
        graph.finish()
    return replaced


def _is_convolution(node: Node) -> bool:
    return node.target in (aten.conv1d.default, aten.conv2d.default)


def _folded(graph: Graph, layer: Node, norm: Node) -> Node:
    weight = graph.weight(graph.operand(layer, "weight"))
    given = {
        name: None if (node := graph.operand(norm, name)) is None else graph.weight(node)
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    mean, variance = given["running_mean"], given["running_var"]
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + graph.operand(norm, "eps"))
    scale = scale if given["weight"] is None else scale * given["weight"]
    held = graph.operand(layer, "bias")
    bias = (0.0 if held is None else graph.weight(held)) - mean
    bias = bias * scale if given["bias"] is None else bias * scale + given["bias"]
    name = f"{norm.name}_folded"
    shape = [-1, *[1] * (weight.ndim - 1)]
    operands = (
        graph.add_weight(f"{name}_weight", weight * scale.reshape(shape)),
        graph.add_weight(f"{name}_bias", bias),
    )
    rest = [graph.operand(layer, n) for n in ("stride", "padding", "dilation", "groups")]
    source = graph.operand(layer, "input")
    return graph.call(layer.target, source, *operands, *rest, before=norm, like=norm)  # pyright: ignore[reportArgumentType]
