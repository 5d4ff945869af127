"""A rewrite rule: a pattern, and a function that builds what replaces it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from lamella.errors import RewriteError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.rewrite.pattern import AnyOf, Call, Match, Matcher, Pattern

EXPENSIVE = frozenset({"contraction", "attention", "softmax", "scan"})
"""Categories of operators that a rule must not compute twice."""


@dataclass(frozen=True)
class Skip:
    """A pattern matched, and the rule does not apply.

    Attributes:
        reason: Why, in one clause.
    """

    reason: str


Rewrite = Callable[[Graph, Match], Node | Skip]


@dataclass(frozen=True)
class Rule:
    """A pattern and what to put in its place.

    Attributes:
        name: The name of the function.
        pattern: What it meets.
        equation: The docstring of the function: what becomes what.
        rewrite: Builds the replacement before the root and returns it, or says why not.
    """

    name: str
    pattern: Pattern
    equation: str
    rewrite: Rewrite

    @property
    def roots(self) -> tuple[Any, ...]:
        """The operators that the root of a match may call."""
        return _roots(self.pattern)

    def match(self, graph: Graph, node: Node) -> Match | None:
        """Where the pattern fits at `node`, or None."""
        return Matcher(graph).match(self.pattern, node)

    def apply(self, graph: Graph, found: Match) -> Node | Skip:
        """Build the replacement of ``found.root``; nothing is replaced yet.

        Raises:
            RewriteError: The replacement has another shape or dtype.
        """
        shared = [node for node in found.nodes[1:] if _expensive_and_read_elsewhere(node, found)]
        if shared:
            return Skip(f"{shared[0].name} is read outside of the pattern too")
        made = self.rewrite(graph, found)
        if isinstance(made, Node):
            _check(self, found.root, made)
        return made

    def explain(self, graph: Graph, node: Node) -> str:
        """Why the rule does or does not apply at `node`; the graph is left as it is."""
        if node.op != "call_function" or node.target not in self.roots:
            wanted = ", ".join(ops.op_name(target) for target in self.roots)
            return f"{self.name} starts at {wanted}, and {node.name} is none"
        matcher = Matcher(graph)
        if matcher.match(self.pattern, node) is None:
            near = matcher.nearest
            return f"{self.name} does not match at {node.name}: {near}"
        twin = graph.copy()
        root = next(other for other in twin.nodes if other.name == node.name)
        found = self.match(twin, root)
        assert found is not None  # a copy matches like the original
        made = self.apply(twin, found)
        if isinstance(made, Skip):
            return f"{self.name} matches at {node.name} and does not apply: {made.reason}"
        return f"{self.name} applies at {node.name}"


def rule(pattern: Pattern) -> Callable[[Rewrite], Rule]:
    """Make a rule of a function; its docstring is the equation."""

    def make(rewrite: Rewrite) -> Rule:
        name = getattr(rewrite, "__name__", "rule")
        return Rule(name, pattern, inspect.getdoc(rewrite) or "", rewrite)

    return make


def _roots(pattern: Pattern) -> tuple[Any, ...]:
    if isinstance(pattern, Call):
        return pattern.targets
    if isinstance(pattern, AnyOf):
        found = [target for part in pattern.alternatives for target in _roots(part)]
        return tuple(dict.fromkeys(found))
    raise RewriteError(f"a rule starts with a Call or with AnyOf several, not with {pattern}")


def _expensive_and_read_elsewhere(node: Node, found: Match) -> bool:
    facts = ops.facts(node.target)
    if facts is None or facts.category not in EXPENSIVE:
        return False
    return any(user not in found.nodes for user in node.users)


def _check(rule: Rule, old: Node, new: Node) -> None:
    was, now = old.meta["val"], new.meta["val"]
    if not hasattr(was, "dtype"):
        return
    known = [(a, b) for a, b in zip(was.shape, now.shape, strict=False) if isinstance(a, int)]
    differs = any(isinstance(b, int) and a != b for a, b in known)
    if was.dtype != now.dtype or was.ndim != now.ndim or differs:
        raise RewriteError(
            f"{rule.name} replaces {old.name} ({was.dtype}, {list(was.shape)}) by {new.name} "
            f"({now.dtype}, {list(now.shape)})"
        )
