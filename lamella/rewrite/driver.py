"""Applies rules until none applies any more."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from lamella.errors import RewriteError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.rewrite.rule import Rule, Skip

_log = logging.getLogger(__name__)

_ROUNDS = 50
"""More rounds than any chain of rewrites needs; rules that undo each other need more."""


@dataclass(frozen=True)
class Skipped:
    """A rule that matched and did not apply.

    Attributes:
        rule: Name of the rule.
        node: Name of the node where the match starts.
        reason: Which condition failed, on which node.
    """

    rule: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.node}: {self.reason}"


@dataclass
class _Tally:
    counts: Counter[str] = field(default_factory=Counter)
    skipped: dict[tuple[str, str], Skipped] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewrites:
    """What `rewrite` did.

    Attributes:
        counts: Name of each rule that applied -> how often.
        skipped: Rules that matched and did not apply, at the end.
    """

    counts: dict[str, int]
    skipped: tuple[Skipped, ...]


def apply_rules(graph: Graph, rules: Sequence[Rule]) -> dict[str, int]:
    """Apply `rules` until none applies, and finish the graph; how often each did, by name."""
    counts = rewrite(graph, rules).counts
    if counts:
        graph.finish()
    return counts


def rewrite(graph: Graph, rules: Sequence[Rule]) -> Rewrites:
    """Apply `rules` until none applies; dead code goes, the rest of finishing is left.

    One round visits every node once, in order; rules that start with the operator of the node
    are tried in the order given.

    Raises:
        RewriteError: Rules undo each other, or one builds something of another shape.
    """
    index: dict[Any, list[Rule]] = defaultdict(list)
    for one in rules:
        for target in one.roots:
            index[target].append(one)
    total = Counter[str]()
    tally = _Tally()
    for _ in range(_ROUNDS):
        tally = _Tally()
        _sweep(graph, index, tally)
        total.update(tally.counts)
        if not tally.counts:
            return Rewrites(dict(total), tuple(tally.skipped.values()))
        graph.prune()
    fighting = ", ".join(sorted(tally.counts))
    raise RewriteError(f"rewrite rules still apply after {_ROUNDS} rounds: {fighting}")


def _sweep(graph: Graph, index: dict[Any, list[Rule]], tally: _Tally) -> None:
    for node in graph.nodes:
        candidates = index.get(node.target) if node.op == "call_function" else None
        for one in candidates or ():
            if not node.users:
                break
            if _try(graph, one, node, tally):
                break


def _try(graph: Graph, one: Rule, node: Node, tally: _Tally) -> bool:
    found = one.match(graph, node)
    if found is None:
        return False
    with graph.author(one.name):
        made = one.apply(graph, found)
        if isinstance(made, Skip):
            tally.skipped[one.name, node.name] = Skipped(one.name, node.name, made.reason)
            return False
        if made is node:
            raise RewriteError(f"{one.name} replaces {node.name} by itself")
        _label(node, one.name)
        graph.replace(node, made)
    _log.debug("%s: %s (%s)", one.name, node.name, ops.op_name(node.target))
    tally.counts[one.name] += 1
    return True


def _label(root: Node, author: str) -> None:
    """Nodes that a rule made carry the module labels of what they replace."""
    stack = root.meta.get("nn_module_stack")
    node = root.prev
    while stack is not None and node.meta.get("author") == author:
        node.meta.setdefault("nn_module_stack", stack)
        node = node.prev
