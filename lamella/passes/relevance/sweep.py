"""The sweep of coefficients through a graph, from its output to where relevance is wanted."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from lamella.errors import MissingRuleError
from lamella.ir.graph import Graph
from lamella.ir.ops import argument_names, bind, op_name
from lamella.passes.relevance.traced import Recorder
from lamella.rules.relevance.presets import Preset
from lamella.rules.relevance.roles import Role
from lamella.rules.relevance.rule import Place, Rule, Terminal
from lamella.rules.relevance.view import zeros_for


@dataclass(frozen=True)
class Step:
    """What the sweep did at one node.

    Attributes:
        node: The node.
        coefficient: Of its result, or one for each of several results (None where nothing reads).
        given: Each operand that is a node, with the coefficient that it got from here.
        passes: Whether relevance goes on from here to the operand.
    """

    node: Node
    coefficient: Any
    given: tuple[tuple[Node, Any], ...]
    passes: frozenset[Node]


def _nothing(_: Any) -> None:
    """What is called where nobody wants to know."""


@dataclass
class Sweep:
    """Coefficients of the nodes of a graph, computed in reverse order.

    Attributes:
        recorder: Writes the nodes.
        preset: The rules.
        roles: The role of every node.
        ends: Nodes behind which the sweep does not go: the attributed inputs.
        carrying: Nodes that pass relevance on to something that is wanted.
        coefficients: Of the nodes that were reached.
        enter: Called with each node that was reached, before its rule.
        stepped: Called with what was done at a node.
        passed: Called with every node, when its coefficient is known.
    """

    recorder: Recorder
    preset: Preset
    roles: Mapping[Node, Role]
    ends: frozenset[Node]
    carrying: frozenset[Node]
    places: Mapping[Node, Place]
    coefficients: dict[Node, Any] = field(default_factory=dict[Node, Any])
    terminal: dict[Node, Any] = field(default_factory=dict[Node, Any])
    enter: Callable[[Node], None] = _nothing
    stepped: Callable[[Step], None] = _nothing
    passed: Callable[[Node], None] = _nothing
    _pending: dict[Node, Any] = field(default_factory=dict[Node, Any])

    def run(self, output: Node, seed: Any, nodes: list[Node]) -> None:
        """Go from `output` with the coefficient `seed` through `nodes` (in topological order)."""
        rules = self._rules(nodes, output)
        self._pending[output] = seed
        for node in reversed(nodes):
            coefficient = self._pending.pop(node, None)
            if coefficient is not None:
                self.enter(node)
                self.coefficients[node] = coefficient
                if node not in self.ends:
                    self._step(node, coefficient, rules[node])
            self.passed(node)
        assert not self._pending, self._pending

    def _rules(self, nodes: list[Node], output: Node) -> dict[Node, Rule]:
        """The rule of every node on the way; complains about all that have none at once."""
        reached = _ancestors(output, self.carrying, self.ends)
        wanted = [node for node in nodes if node in reached and node not in self.ends]
        missing = Counter(
            op_name(node.target)
            for node in wanted
            if node.target is not operator.getitem and not self.preset.has(self.places[node])
        )
        if missing:
            listed = ", ".join(f"{name} (x{count})" for name, count in missing.items())
            raise MissingRuleError(
                f"no relevance rule for {listed} in preset {self.preset.name!r}; add one with "
                f"RuleTable.extend"
            )
        return {
            node: _pick if node.target is operator.getitem else self.preset.rule(self.places[node])
            for node in wanted
        }

    def _step(self, node: Node, coefficient: Any, rule: Rule) -> None:
        if node.target is operator.getitem:
            self._collect(node, coefficient)
            return
        arguments = _arguments(node)
        filled, output = self._filled(node, coefficient)
        found = rule(filled, output, *self.recorder.values(arguments))
        given = tuple(_pairs(arguments, found))
        passes = frozenset(operand for operand, _ in given if operand in self.carrying)
        for operand, part in given:
            if operand in passes:
                self._add(operand, part)
        self.stepped(Step(node, filled, given, passes))

    def _add(self, operand: Node, part: Any) -> None:
        if isinstance(part, Terminal):
            before = self.terminal.get(operand)
            self.terminal[operand] = part.relevance if before is None else before + part.relevance
            return
        before = self._pending.get(operand)
        # Written at once: what is read for the last time here can be freed here.
        added = part if before is None else before + part
        self._pending[operand] = self.recorder.value(added.node)

    def _collect(self, node: Node, coefficient: Any) -> None:
        """One of several results: its coefficient waits for those of the others."""
        source, place = node.args
        assert isinstance(source, Node)
        assert isinstance(place, int)
        if source not in self.carrying:
            return
        parts = self._pending.setdefault(source, [None] * len(source.meta["val"]))
        parts[place] = coefficient if parts[place] is None else parts[place] + coefficient

    def _filled(self, node: Node, coefficient: Any) -> tuple[Any, Any]:
        """The coefficient and the value of a node as its rule reads them."""
        value = self.recorder.value(node)
        if not isinstance(coefficient, list):
            return coefficient, value
        results = tuple(value[place] for place in range(len(coefficient)))
        parts: list[Any] = []
        for part, result, fake in zip(coefficient, results, node.meta["val"], strict=True):
            if part is None and isinstance(fake, Tensor) and fake.is_floating_point():
                part = zeros_for(result)
            parts.append(part)
        return tuple(parts), results


def _pick(*_: Any) -> tuple[Any, ...]:
    raise AssertionError("several results are collected")


def carrying_nodes(
    graph: Graph, roles: Mapping[Node, Role], wanted: Collection[Node], ends: Collection[Node]
) -> frozenset[Node]:
    """The nodes that are wanted, or that relevance flows through to something that is."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "output" or not roles[node].carries:
            continue
        behind = node not in ends and any(operand in found for operand in node.all_input_nodes)
        if node in wanted or behind:
            found.add(node)
    return frozenset(found)


def places_of(graph: Graph, roles: Mapping[Node, Role]) -> dict[Node, Place]:
    """The place of every call."""
    blocks = {node: block for block in graph.blocks for node in block.nodes}
    nodes = graph.nodes
    return {
        node: Place(node, roles, blocks.get(node), index / len(nodes))
        for index, node in enumerate(nodes)
        if node.op == "call_function"
    }


def _ancestors(output: Node, carrying: Collection[Node], ends: Collection[Node]) -> frozenset[Node]:
    found: set[Node] = set()
    todo = [output]
    while todo:
        node = todo.pop()
        if node in found or node not in carrying:
            continue
        found.add(node)
        if node not in ends:
            todo.extend(node.all_input_nodes)
    return frozenset(found)


def _arguments(node: Node) -> list[Any]:
    bound = bind(node)
    return [bound.get(name) for name in argument_names(node.target)]


def _pairs(arguments: Any, found: Any) -> list[tuple[Node, Any]]:
    """Each operand with what the rule gives it; lists go in parallel."""
    pairs: list[tuple[Node, Any]] = []
    for argument, part in zip(arguments, found, strict=True):
        if part is None:
            continue
        if isinstance(argument, Node):
            pairs.append((argument, part))
        elif isinstance(argument, list | tuple) and isinstance(part, list | tuple):
            pairs += _pairs(argument, part)
    return pairs
