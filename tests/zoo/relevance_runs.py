"""Relevance graphs of the families, in float32 and float64, each made once per session."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.operators import REFERENCE
from lamella.ir.ops import aten, lam
from lamella.ir.torch_private import tree_leaves
from lamella.passes.relevance.emit import RelevanceGraph, emit
from lamella.passes.relevance.request import Request, Tap, relevance_of
from lamella.passes.relevance.traced import Shapes
from lamella.rules.relevance.presets import PRESETS
from tests.conftest import _canonical, family_of

Inputs = Mapping[str, Tensor]


@functools.cache
def shapes_of(family: str) -> Shapes:
    """What the emissions for one family know of shapes."""
    return {}


def relevance_graph(family: str, preset: str) -> RelevanceGraph:
    """The graph with the ledger, and a tap at the exit of every block.

    Presets that differ in operators that the family does not have share one.
    """
    graph = _canonical(family)
    if preset in ("eps-gamma-box", "alpha2-beta1") and not graph.find(*_CONVOLUTIONS):
        preset = "eps-plus"
    if preset == "mamba" and not graph.find(lam.selective_scan.default, lam.head_scan.default):
        preset = "attnlrp"
    return _relevance_graph(family, preset)


_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)


@functools.cache
def _relevance_graph(family: str, preset: str) -> RelevanceGraph:
    graph = _canonical(family)
    exits = dict.fromkeys(block.exit.name for block in graph.blocks)
    taps = tuple(Tap(name, (name,), of_pair) for name in exits)
    request = Request(taps=taps, ledger=True)
    return emit(graph, PRESETS[preset], request, shapes=shapes_of(family))


def of_pair(pair: tuple[Any, Any]) -> Any:
    """The relevance of one value."""
    return relevance_of(*pair)


def in_double(graph: Graph) -> Graph:
    """A copy that computes in float64 what `graph` computes in float32."""
    twin = graph.copy()
    for node in twin.weight_nodes():
        weight = twin.weight(node)
        if weight.dtype == torch.float32:
            twin.set_weight(node, weight.double())
    for node in twin.nodes:
        if node.op == "call_function":
            node.args = tuple(map(_wide, node.args))
            node.kwargs = {name: _wide(value) for name, value in node.kwargs.items()}
    return twin


def _wide(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def double_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """The same inputs in float64."""
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@functools.cache
def seed_of(family: str) -> Tensor:
    """A random coefficient for every entry of the first output, in float64."""
    inputs = family_of(family).inputs()
    output = tree_leaves(_canonical(family)(**inputs))[0]
    generator = torch.Generator().manual_seed(3)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64)


class _Watched(fx.Interpreter):
    """Runs a graph under autograd; some values are leaves, some are remembered."""

    def __init__(self, graph: Graph, leaves: set[str], wanted: set[str]) -> None:
        super().__init__(graph.module, garbage_collect_values=False)
        self.leaves, self.wanted = leaves, wanted
        self.found: dict[str, Tensor] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # The operators of Lamella have no derivative; their definitions have.
        return super().call_function(REFERENCE.get(target, target), args, kwargs)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.leaves:
            value = value.detach().requires_grad_()
        if n.name in self.leaves | self.wanted:
            self.found[n.name] = value
        return value


def autograd_relevance(
    family: str, inputs: Inputs, leaves: set[str], wanted: set[str], seed: Tensor
) -> dict[str, Tensor]:
    """Gradient times value at `leaves` and `wanted`, by autograd in float64."""
    running = _Watched(in_double(_canonical(family)), leaves, wanted)
    with torch.enable_grad():
        values = _canonical(family).signature.flatten((), double_inputs(inputs))
        output = running.run(*values)[0]
        names = [name for name, value in running.found.items() if value.requires_grad]
        values = [running.found[name] for name in names]
        gradients = torch.autograd.grad(output, values, seed, allow_unused=True)
    return {
        name: value.detach() * (torch.zeros_like(value) if slope is None else slope)
        for name, value, slope in zip(names, values, gradients, strict=True)
    }
