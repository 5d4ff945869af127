"""Patterns: what they meet, what they bind, and how far they came when they don't."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.pattern import AnyOf, Call, Cast, Literal, Match, Matcher, Number, Var
from tests.unit.written import graph_of, random

aten = torch.ops.aten
X, Y = random(2, 3), random(2, 3, seed=1)


def last(graph: Graph) -> Node:
    return graph.outputs[0]


def match(pattern: Any, function: Any, *inputs: torch.Tensor, **weights: Any) -> Match | None:
    graph = graph_of(function, *inputs, **weights)
    return Matcher(graph).match(pattern, last(graph))


def test_a_call_binds_its_operands() -> None:
    found = match(Call(aten.sub.Tensor, Var("x"), Var("y")), lambda a, b: a - b, X, Y)
    assert found is not None
    assert [found["x"].name, found["y"].name] == ["a", "b"]
    assert found.nodes == (found.root,)


def test_commutative_operators_match_in_both_orders() -> None:
    pattern = Call(aten.mul.Tensor, Var("x"), Call(aten.sigmoid.default, Var("x")))
    assert match(pattern, lambda a: a * torch.sigmoid(a), X)
    assert match(pattern, lambda a: torch.sigmoid(a) * a, X)


def test_other_operators_match_in_order_only() -> None:
    pattern = Call(aten.sub.Tensor, Var("x"), Call(aten.sigmoid.default, Var("x")))
    assert match(pattern, lambda a: a - torch.sigmoid(a), X)
    assert match(pattern, lambda a: torch.sigmoid(a) - a, X) is None


def test_the_same_name_twice_means_the_same_node() -> None:
    pattern = Call(aten.mul.Tensor, Var("x"), Var("x"))
    assert match(pattern, lambda a, b: a * a + 0 * b, X, Y) is None
    assert match(pattern, lambda a: a * a, X)
    assert match(pattern, lambda a, b: a * b, X, Y) is None


def test_a_wrong_first_choice_is_taken_back() -> None:
    # `x` can be bound to either factor; only one choice lets the second operand fit.
    pattern = Call(
        aten.add.Tensor, Call(aten.mul.Tensor, Var("x"), Var("y")), Call(aten.exp.default, Var("y"))
    )
    found = match(pattern, lambda a, b: a * b + torch.exp(a), X, Y)
    assert found is not None
    assert (found["x"].name, found["y"].name) == ("b", "a")


@pytest.mark.parametrize("value", [0.7978845608028654, 0.79788456, 0.797884])
def test_numbers_are_compared_with_a_tolerance(value: float) -> None:
    pattern = Call(aten.mul.Tensor, Var("x"), Literal((2 / torch.pi) ** 0.5, tolerance=1e-5))
    assert match(pattern, lambda a: a * value, X)
    assert match(pattern, lambda a: a * (value + 1e-3), X) is None


def test_a_number_is_bound_as_a_scalar_wherever_it_stands() -> None:
    pattern = Call(aten.add.Tensor, Var("x"), Number("eps"))
    assert match(pattern, lambda a: a + 1e-6, X)["eps"] == 1e-6  # type: ignore[index]
    found = match(pattern, lambda a, w: a + w, X, w=torch.tensor(0.25, dtype=torch.float64))
    assert found is not None
    assert found["eps"] == 0.25
    assert match(pattern, lambda a, w: a + w, X, w=random(3)) is None


def test_true_is_not_one() -> None:
    pattern = Call(aten.mean.dim, Var("x"), [-1], True)
    assert match(pattern, lambda a: a.mean(-1, keepdim=True), X)
    assert match(pattern, lambda a: a.mean(-1), X) is None
    assert match(Call(aten.mean.dim, Var("x"), [-1], 1), lambda a: a.mean(-1, True), X) is None


def test_what_is_not_mentioned_must_have_its_default() -> None:
    pattern = Call(aten.add.Tensor, Var("x"), Var("y"))
    assert match(pattern, lambda a, b: torch.add(a, b, alpha=2), X, Y) is None
    assert match(pattern, lambda a, b: torch.add(a, b, alpha=1), X, Y)
    opened = Call(aten.add.Tensor, Var("x"), Var("y"), ...)
    assert match(opened, lambda a, b: torch.add(a, b, alpha=2), X, Y)


def test_operands_are_met_by_schema_name() -> None:
    pattern = Call(aten.softmax.int, dim=Var("axis"), self=Var("x"))
    found = match(pattern, lambda a: torch.softmax(a, -1), X)
    assert found is not None
    assert found["axis"] == -1


def test_alternatives_and_several_targets() -> None:
    pattern = AnyOf(
        Call((aten.sin.default, aten.cos.default), Var("x")), Call(aten.exp.default, Var("x"))
    )
    for function in (torch.sin, torch.cos, torch.exp):
        assert match(pattern, lambda a, f=function: f(a), X)
    assert match(pattern, torch.tanh, X) is None


def test_casts_are_looked_through() -> None:
    pattern = Call(aten.exp.default, Cast(Call(aten.sin.default, Var("x"))))
    assert match(pattern, lambda a: torch.exp(torch.sin(a)), X)
    found = match(pattern, lambda a: torch.exp(torch.sin(a).to(torch.float32)), X)
    assert found is not None
    assert [node.target for node in found.nodes] == [
        aten.exp.default,
        aten.to.dtype,
        aten.sin.default,
    ]


def test_lists_are_matched_part_by_part() -> None:
    pattern = Call(aten.cat.default, [Var("x"), Call(aten.neg.default, Var("x"))], -1)
    assert match(pattern, lambda a: torch.cat([a, -a], -1), X)
    assert match(pattern, lambda a: torch.cat([a, -a, a], -1), X) is None


def test_calls_without_a_schema() -> None:
    pattern = Call(operator.getitem, Call(aten.topk.default, Var("x"), 2, ...), 1)
    assert match(pattern, lambda a: a.topk(2)[1], X)
    assert match(pattern, lambda a: a.topk(2)[0], X) is None


def test_the_nearest_miss_names_the_node_and_the_reason() -> None:
    graph = graph_of(lambda a: a * torch.tanh(a), X)
    matcher = Matcher(graph)
    pattern = Call(aten.mul.Tensor, Var("x"), Call(aten.sigmoid.default, Var("x")))
    assert matcher.match(pattern, last(graph)) is None
    assert str(matcher.nearest) == "tanh (aten.tanh.default) is not aten.sigmoid.default"


def test_the_nearest_miss_is_the_one_that_matched_most() -> None:
    graph = graph_of(lambda a, b: torch.exp(torch.sin(a * b)), X, Y)
    matcher = Matcher(graph)
    pattern = Call(aten.exp.default, Call(aten.sin.default, Call(aten.mul.Tensor, Var("x"), 3.0)))
    assert matcher.match(pattern, last(graph)) is None
    assert matcher.nearest is not None
    assert len(matcher.nearest.matched) == 3
    assert str(matcher.nearest) == "b (placeholder) is not 3.0"
