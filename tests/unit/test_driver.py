"""The driver: to a fixpoint, in order, with counts; no match means no edit."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Node

from lamella.errors import RewriteError
from lamella.ir.graph import Graph
from lamella.rewrite.driver import Skipped, apply_rules, rewrite
from lamella.rewrite.pattern import Call, Match, Var
from lamella.rewrite.rule import Skip, rule
from tests.unit.written import graph_of, operators, random

aten = torch.ops.aten
X = random(2, 3)


@rule(Call(aten.neg.default, Call(aten.neg.default, Var("x"))))
def neg_of_neg(graph: Graph, found: Match) -> Node:
    """``-(-x) -> x``."""
    return found["x"]


@rule(Call(aten.sin.default, Var("x")))
def sine_is_cosine(graph: Graph, found: Match) -> Node:
    """``sin(x) -> cos(x)``: not true, and easy to see."""
    return graph.call(aten.cos.default, found["x"], before=found.root, like=found.root)


@rule(Call(aten.cos.default, Var("x")))
def cosine_is_sine(graph: Graph, found: Match) -> Node:
    """``cos(x) -> sin(x)``."""
    return graph.call(aten.sin.default, found["x"], before=found.root, like=found.root)


@rule(Call(aten.sin.default, Var("x")))
def never(graph: Graph, found: Match) -> Node | Skip:
    """Nothing."""
    return Skip("never")


def test_rules_apply_until_none_does() -> None:
    def negated(x: torch.Tensor) -> torch.Tensor:
        x = torch.sin(x)
        for _ in range(6):
            x = torch.neg(x)
        return x

    graph = graph_of(negated, X)
    assert apply_rules(graph, [neg_of_neg]) == {"neg_of_neg": 3}
    assert operators(graph) == {"sin": 1}


def test_without_a_match_nothing_is_edited() -> None:
    graph = graph_of(torch.cos, X)
    graph.finish()
    edits = graph.edits
    assert apply_rules(graph, [neg_of_neg, never]) == {}
    assert graph.edits == edits


def test_the_first_rule_that_applies_wins() -> None:
    graph = graph_of(torch.sin, X)
    done = rewrite(graph, [never, sine_is_cosine])
    assert done.counts == {"sine_is_cosine": 1}
    assert done.skipped == ()


def test_skips_are_reported_with_their_node() -> None:
    graph = graph_of(torch.sin, X)
    done = rewrite(graph, [never])
    assert done.skipped == (Skipped("never", "sin", "never"),)
    assert str(done.skipped[0]) == "never at sin: never"


def test_rules_that_undo_each_other_are_named() -> None:
    graph = graph_of(torch.sin, X)
    with pytest.raises(RewriteError, match="still apply after 50 rounds: "):
        rewrite(graph, [sine_is_cosine, cosine_is_sine])


def test_a_rule_that_replaces_a_node_by_itself_is_an_error() -> None:
    @rule(Call(aten.sin.default, ...))
    def nothing(graph: Graph, found: Match) -> Node:
        """``x -> x``."""
        return found.root

    with pytest.raises(RewriteError, match="nothing replaces sin by itself"):
        rewrite(graph_of(torch.sin, X), [nothing])


def test_new_nodes_know_their_rule_and_keep_the_module_labels() -> None:
    graph = graph_of(torch.sin, X)
    graph.outputs[0].meta["nn_module_stack"] = {"layer": ("layer", torch.nn.Linear)}
    apply_rules(graph, [sine_is_cosine])
    made = graph.outputs[0]
    assert made.meta["author"] == "sine_is_cosine"
    assert made.meta["nn_module_stack"] == {"layer": ("layer", torch.nn.Linear)}
