"""Coefficients of chosen values of a model, one sample at a time, handed over when they are made.

The relevance graph of a model runs in two parts: what does not depend on the seed runs once for
a sample, the sweep once for every seed. A coefficient is given to whoever asked for it as soon as
it is there and freed after its last reader, so that what is kept is what a score makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.segments import Program, Segment, Values, program
from lamella.passes.relevance.emit import SEED, emit
from lamella.passes.relevance.request import Request, Tap
from lamella.passes.scores.target import LossTarget
from lamella.rules.relevance.presets import Preset

Seen = Callable[[str, Tensor], None]
"""Takes the name of a node of the model and its coefficient."""


class Sweeps:
    """Runs a model, and relevance backwards through it for one seed after the other."""

    def __init__(
        self,
        graph: Graph,
        preset: Preset,
        target: LossTarget,
        wanted: Iterable[str],
        kept: Iterable[str] = (),
    ) -> None:
        """Emit the relevance graph.

        Args:
            graph: Of the model.
            preset: The rules.
            target: The output where relevance starts.
            wanted: Names of the nodes whose coefficients are wanted.
            kept: Names of the nodes whose values `value` is asked for.
        """
        taps = tuple(Tap(name, (name,), _coefficient) for name in dict.fromkeys(wanted))
        request = Request(
            graph.outputs.index(target.node),
            inputs=False,
            taps=taps,
            sources=tuple(_tables(graph, {tap.name for tap in taps})),
        )
        made = emit(graph, preset, request)
        outputs = dict(zip(made.graph.signature.outputs, made.graph.outputs, strict=True))
        self._signature = graph.signature
        self._by_name = {node.name: node for node in made.graph.nodes}
        self._by_name |= {old: self._by_name[new] for old, new in made.replaced.items()}
        self._wanted: dict[Node, list[str]] = {}
        for tap in taps:
            self._wanted.setdefault(outputs[f"tap.{tap.name}"], []).append(tap.name)
        self._seed = self._by_name[SEED]
        self._target = self._by_name[target.node.name]
        late = _behind(made.graph, self._seed)
        self._sweep = program(made.graph, (), together=[[node] for node in self._wanted])
        self._late = [_only(segment, late) for segment in self._sweep.segments]
        read = {operand for node in late for operand in node.all_input_nodes} - late
        mask = [] if target.mask is None else [self._by_name[target.mask.name]]
        values = [self._target, *mask, *(self._by_name[name] for name in kept)]
        self._forward: Program = program(made.graph, [*read, *values])
        self._rows = LossTarget(self._target, target.kind, mask[0] if mask else None)
        self._values: Values = {}

    def forward(self, sample: Mapping[str, Any]) -> Tensor:
        """The output where relevance starts, for one sample."""
        flat = self._signature.flatten((), sample)
        given = dict(zip(self._signature.inputs, flat, strict=True))
        values = self._forward.start(given | {SEED: torch.zeros(())})
        for _ in self._forward.sweep([values]):
            pass
        self._values = values
        return values[self._target]

    def rows(self, output: Tensor) -> Tensor:
        """The tokens of the output that count, ``[tokens, channels]``."""
        return self._rows.rows(self._values | {self._target: output})

    def value(self, name: str) -> Tensor:
        """What the model computed at a node that is kept, or a weight of it."""
        node = self._by_name[name]
        if node.op == "get_attr":
            return self._forward.graph.weight(node)
        return self._values[node]

    def backward(self, seed: Tensor, seen: Seen) -> None:
        """Sweep from the coefficient `seed` of the output; `seen` gets each wanted coefficient.

        Nodes that no relevance reaches are left out.
        """
        values = self._values | {self._seed: seed}
        for name in self._wanted.get(self._seed, ()):
            seen(name, seed)

        def watch(node: Node, running: Values) -> None:
            for name in self._wanted.get(node, ()):
                seen(name, running[node])

        for segment in self._late:
            segment.run(values, segment.read_weights(self._sweep.graph), watch)


def _tables(graph: Graph, names: Collection[str]) -> Iterator[str]:
    """Those of some nodes that look rows up, also by indices that are no input."""
    for node in graph.find(aten.embedding.default, lam.embedding_nbits.default):
        if node.name in names:
            yield node.name


def _coefficient(pair: tuple[Any, Any]) -> Any:
    return pair[1]


def _behind(graph: Graph, source: Node) -> set[Node]:
    """The calls that depend on `source`."""
    found = {source}
    for node in graph.nodes:
        if node.op == "call_function" and any(one in found for one in node.all_input_nodes):
            found.add(node)
    return found - {source}


def _only(segment: Segment, nodes: set[Node]) -> Segment:
    """What a segment computes of `nodes`; other values are not freed."""
    pairs = zip(segment.nodes, segment.frees, strict=True)
    chosen = [(node, frees) for node, frees in pairs if node in nodes]
    read = {operand for node, _ in chosen for operand in node.all_input_nodes}
    return Segment(
        tuple(node for node, _ in chosen),
        tuple(tuple(one for one in frees if one in nodes) for _, frees in chosen),
        tuple(weight for weight in segment.weights if weight in read),
    )
