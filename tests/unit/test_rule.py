"""Rules: they apply, they skip with a reason, and they explain themselves without touching."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Node

from lamella.errors import RewriteError
from lamella.ir.graph import Graph
from lamella.rewrite.canonical.attention import attention_from_softmax
from lamella.rewrite.driver import apply_rules
from lamella.rewrite.pattern import AnyOf, Call, Match, Var
from lamella.rewrite.rule import Rule, Skip, rule
from tests.unit.written import graph_of, operators, random

aten = torch.ops.aten
X = random(2, 3)


@rule(Call(aten.mul.Tensor, Var("x"), 1))
def mul_by_one(graph: Graph, found: Match) -> Node | Skip:
    """``x * 1 -> x``, unless the product promotes the dtype."""
    x: Node = found["x"]
    if x.meta["val"].dtype != found.root.meta["val"].dtype:
        return Skip("the product promotes the dtype")
    return x


def test_a_rule_is_data() -> None:
    assert isinstance(mul_by_one, Rule)
    assert mul_by_one.name == "mul_by_one"
    assert mul_by_one.equation == "``x * 1 -> x``, unless the product promotes the dtype."
    assert mul_by_one.roots == (aten.mul.Tensor,)


def test_a_rule_applies() -> None:
    graph = graph_of(lambda a: torch.sin(a * 1), X)
    assert apply_rules(graph, [mul_by_one]) == {"mul_by_one": 1}
    assert operators(graph) == {"sin": 1}


def test_a_rule_skips_with_its_reason() -> None:
    graph = graph_of(lambda a: a * 1.0, torch.arange(3))
    explained = mul_by_one.explain(graph, graph.outputs[0])
    assert explained == (
        "mul_by_one matches at mul and does not apply: the product promotes the dtype"
    )
    assert apply_rules(graph, [mul_by_one]) == {}


def test_explaining_a_match_leaves_the_graph_alone() -> None:
    graph = graph_of(lambda a: torch.sin(a * 1), X)
    before, edits = graph.module.code, graph.edits
    assert mul_by_one.explain(graph, graph.find(aten.mul.Tensor)[0]) == "mul_by_one applies at mul"
    assert (graph.module.code, graph.edits) == (before, edits)
    assert operators(graph) == {"mul": 1, "sin": 1}


def test_explaining_a_near_miss_names_condition_and_node() -> None:
    graph = graph_of(lambda a: a * 2, X)
    assert mul_by_one.explain(graph, graph.outputs[0]) == (
        "mul_by_one does not match at mul: 2 is not 1"
    )


def test_explaining_another_operator() -> None:
    graph = graph_of(lambda a: a + 1, X)
    assert mul_by_one.explain(graph, graph.outputs[0]) == (
        "mul_by_one starts at aten.mul.Tensor, and add is none"
    )


def test_expensive_work_is_not_done_twice() -> None:
    def attention(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.softmax(a @ a.transpose(-1, -2), -1)
        return weights @ a, weights

    graph = graph_of(attention, random(2, 4, 3))
    assert attention_from_softmax.explain(graph, graph.outputs[0]).endswith(
        "does not apply: softmax is read outside of the pattern too"
    )


def test_a_replacement_of_another_dtype_is_an_error() -> None:
    @rule(Call(aten.sin.default, Var("x")))
    def sine_in_half(graph: Graph, found: Match) -> Node:
        """Wrong."""
        return graph.call(aten.to.dtype, found["x"], torch.float16, before=found.root)

    graph = graph_of(torch.sin, X)
    with pytest.raises(RewriteError, match=r"sine_in_half replaces sin .*float64.* by .*float16"):
        apply_rules(graph, [sine_in_half])


def test_a_replacement_of_another_shape_is_an_error() -> None:
    @rule(Call(aten.sin.default, Var("x")))
    def sine_turned(graph: Graph, found: Match) -> Node:
        """Wrong."""
        return graph.call(aten.transpose.int, found["x"], 0, 1, before=found.root)

    graph = graph_of(torch.sin, X, dynamic=False)
    with pytest.raises(RewriteError, match=r"sine_turned replaces sin .*\[2, 3\].*\[3, 2\]"):
        apply_rules(graph, [sine_turned])


def test_a_rule_must_start_with_an_operator() -> None:
    @rule(Var("x"))
    def anything(graph: Graph, found: Match) -> Node:
        """Wrong."""
        return found["x"]

    with pytest.raises(RewriteError, match="starts with a Call"):
        assert anything.roots


def test_the_roots_of_alternatives() -> None:
    @rule(AnyOf(Call(aten.sin.default, Var("x")), Call((aten.cos.default, aten.sin.default), ...)))
    def waves(graph: Graph, found: Match) -> Node:
        """Any wave."""
        return found["x"]

    assert waves.roots == (aten.sin.default, aten.cos.default)
