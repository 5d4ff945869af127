"""Which nodes of our graph relevance passes, counted on the sweep that ran.

What relevance should pass follows from the roles alone: every value that carries a signal of the
inputs and that the explained output depends on. The emitted graph gives the coefficient of each
as an output, and runs in float64 from a random seed for the whole output. A node is then

* passed, where its coefficient is finite and not zero (or, in a first layer whose rule gives
  relevance at once, the relevance of the input);
* held fixed, where all that read it give it nothing, because their rules say so; under the
  gradient none is;
* lost, where the coefficient is zero or not finite. None should be.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.ops import bind
from lamella.passes.relevance.emit import RelevanceGraph, emit
from lamella.passes.relevance.request import Request, Tap
from lamella.rules.relevance.presets import Preset, preset_of
from lamella.rules.relevance.roles import roles_of, sources_of
from tests.conftest import _canonical, family_of
from tests.zoo.relevance_runs import double_inputs, in_double, seed_of, shapes_of

Stop = tuple[Any, str]
"""An operator, and the name of an operand that it gives no relevance."""


@dataclass(frozen=True)
class Coverage:
    """Names of the nodes of one graph, under one preset.

    Attributes:
        nodes: Those that carry a signal from an input to the output; one with several results
            is one node.
        without_rule: Those of operators that have no rule.
        passed: Those with a coefficient that is finite and not zero.
        held: Those that no coefficient reaches.
        stops: The operands that have a coefficient themselves and give none to those.
    """

    nodes: tuple[str, ...]
    without_rule: tuple[str, ...]
    passed: tuple[str, ...]
    held: tuple[str, ...]
    stops: frozenset[Stop]

    @property
    def lost(self) -> set[str]:
        """Those whose coefficient is zero or not finite."""
        return set(self.nodes) - set(self.passed) - set(self.held)


def coverage(family: str, preset: str | Preset) -> Coverage:
    """Run the sweep of a family and look at every coefficient."""
    preset = preset_of(preset)
    graph = _canonical(family)
    way = signal_nodes(graph)
    sources = sources_of(graph)
    taps = [Tap(n.name, (n.name,), _coefficient) for n in way if isinstance(n.meta["val"], Tensor)]
    made = emit(graph, preset, Request(taps=tuple(taps)), shapes=shapes_of(family))
    found = in_double(made.graph)(**double_inputs(family_of(family).inputs()), seed=seed_of(family))
    nodes = [node for node in way if node.target is not operator.getitem]
    reached = {node for node in way if _name(node, made) in made.reached}
    given = {node: _results(node, way, found) for node in nodes if node in reached}
    for name, node in sources.items():
        # A rule of a first layer gives relevance, and no coefficient.
        given.setdefault(node, [found[f"relevance.{name}"]])
    held = [node for node in nodes if node not in given]
    return Coverage(
        tuple(node.name for node in nodes),
        tuple(n.name for n in nodes if n not in sources.values() and n.target not in preset.table),
        tuple(node.name for node, values in given.items() if _counts(values)),
        tuple(node.name for node in held),
        frozenset(stop for node in held for stop in _stops(node, way, reached)),
    )


def signal_nodes(graph: Graph) -> dict[Node, None]:
    """The values that carry a signal from an input to the output, each result by itself."""
    roles = roles_of(graph, sources_of(graph).values())
    found: dict[Node, None] = {}
    todo: list[Any] = [graph.outputs[0]]
    while todo:
        node = todo.pop()
        if node not in found and roles[node].carries:
            found[node] = None
            todo.extend(node.all_input_nodes)
    return found


def _coefficient(pair: tuple[Any, Any]) -> Any:
    return pair[1]


def _name(node: Node, made: RelevanceGraph) -> str:
    return made.replaced.get(node.name, node.name)


def _results(node: Node, way: Mapping[Node, None], found: Mapping[str, Tensor]) -> list[Tensor]:
    """The coefficients of all results of a node."""
    results = [node, *(user for user in node.users if user.target is operator.getitem)]
    return [
        found[f"tap.{one.name}"] for one in results if one in way and f"tap.{one.name}" in found
    ]


def _counts(coefficients: list[Tensor]) -> bool:
    finite = all(bool(one.isfinite().all()) for one in coefficients)
    return finite and any(bool(one.any()) for one in coefficients)


def _stops(node: Node, way: Mapping[Node, None], reached: set[Node]) -> list[Stop]:
    """The readers that have a coefficient and give none."""
    return [
        (user.target, name)
        for user in node.users
        if user in way and user in reached
        for name, value in bind(user).items()
        if value is node or (isinstance(value, list | tuple) and node in value)
    ]
