"""Graphs of models of the zoo that compute in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import map_aggregate

from lamella.ir.graph import Graph


def widen(graph: Graph) -> None:
    """Compute in float64 throughout; a model as double keeps float32 inside of its norms."""
    for node in graph.inputs:
        if node.meta["val"].is_floating_point():
            graph.set_value(node, node.meta["val"].double())
    for node in graph.weight_nodes():
        if graph.weight(node).is_floating_point():
            graph.set_weight(node, graph.weight(node).double())
    for node in graph.nodes:
        node.args = map_aggregate(node.args, _wide)
        node.kwargs = map_aggregate(node.kwargs, _wide)
    graph.refresh()
    graph.finish()


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
