"""Every invariant is checked: each broken graph is told apart from a sound one."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Node

from lamella.errors import VerificationError
from lamella.ir.graph import Graph
from lamella.ir.verify import verify, violations
from tests.strategies import WIDTH, built, graph_of, programs, returned

aten = torch.ops.aten


@pytest.fixture
def graph() -> Graph:
    """``tanh(x) W^T + x``."""
    graph = graph_of({"x": torch.zeros(3, WIDTH)})
    x = graph.inputs[0]
    weight = graph.add_weight("layer.weight", torch.eye(WIDTH))
    y = graph.call(aten.tanh.default, x, before=graph.output)
    y = graph.call(aten.linear.default, y, weight, before=graph.output)
    return returned(graph, graph.call(aten.add.Tensor, y, x, before=graph.output))


def node(graph: Graph, target: object) -> Node:
    return next(n for n in graph.nodes if n.target is target)


def test_a_sound_graph_passes(graph) -> None:
    verify(graph)
    assert violations(graph) == []


def test_all_violations_are_listed_at_once(graph) -> None:
    graph.module.register_buffer("stray", torch.zeros(1))
    node(graph, aten.tanh.default).target = aten.sinh.default
    graph.signature = dataclasses.replace(graph.signature, inputs=("y",))
    with pytest.raises(VerificationError) as caught:
        verify(graph)
    message = str(caught.value)
    assert message.startswith("the graph has 3 violations: ")
    assert "not canonical: aten.sinh.default (x1)" in message
    assert "weights that nothing reads: stray" in message
    assert "the graph has the inputs x, its signature y" in message


def test_one_violation_is_one(graph) -> None:
    graph.module.register_buffer("stray", torch.zeros(1))
    with pytest.raises(VerificationError, match=r"^the graph has 1 violation: weights that"):
        verify(graph)


def test_other_operators_may_be_allowed(graph) -> None:
    tanh = node(graph, aten.tanh.default)
    graph.replace(tanh, graph.call(aten.sinh.default, tanh.args[0], before=tanh))
    graph.finish()
    assert violations(graph) == ["not canonical: aten.sinh.default (x1)"]
    verify(graph, canonical=False)


# ---- topology -----------------------------------------------------------------------------


def test_a_use_before_the_definition_is_found(graph) -> None:
    linear, tanh = node(graph, aten.linear.default), node(graph, aten.tanh.default)
    linear.append(tanh)
    assert violations(graph) == [f"{linear.name} reads {tanh.name}, which comes after it"]


def test_a_node_of_another_graph_is_found(graph) -> None:
    linear = node(graph, aten.linear.default)
    foreign = node(graph.copy(), aten.tanh.default)
    linear.update_arg(0, foreign)
    found = violations(graph)
    assert f"{linear.name} reads tanh_default, which is not in the graph" in found


def test_an_unknown_reader_is_found(graph) -> None:
    tanh, linear = node(graph, aten.tanh.default), node(graph, aten.linear.default)
    del tanh.users[linear]
    assert violations(graph) == ["linear_default reads tanh_default, which does not know it"]
    tanh.users[linear] = None
    graph.inputs[0].users[linear] = None
    assert violations(graph) == ["x counts linear_default as a reader, which it is not"]


# ---- calls --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (1, {}, r"linear_default \(aten.linear.default\) lacks weight"),
        (0, {}, r"linear_default \(aten.linear.default\) lacks input, weight"),
        (2, {"bais": None}, "has an argument 'bais' that its schema has not"),
        (2, {"weight": None}, "has the argument 'weight' twice"),
        (4, {}, "has 4 arguments, its schema 3"),
    ],
)
def test_arguments_fit_the_schema(graph, args, kwargs, message) -> None:
    linear = node(graph, aten.linear.default)
    operands = (*linear.args, None, None)
    linear.args = operands[:args]
    linear.kwargs = kwargs
    with pytest.raises(VerificationError, match=message):
        verify(graph)


def test_a_missing_fake_value_is_found(graph) -> None:
    del node(graph, aten.tanh.default).meta["val"]
    assert violations(graph) == ["tanh_default has no fake value"]


# ---- weights and signature ----------------------------------------------------------------


def test_a_weight_that_does_not_exist_is_found(graph) -> None:
    graph.weight_nodes()[0].target = "layer.weigth"
    found = violations(graph)
    assert found == [
        "layer_weight reads a weight 'layer.weigth' that does not exist",
        "weights that nothing reads: layer.weight",
    ]


def test_a_weight_of_another_shape_is_found(graph) -> None:
    graph.module.layer.weight = torch.zeros(2, WIDTH)
    found = violations(graph)
    assert found == ["weight 'layer.weight' is float32[2, 8], its readers expect float32[8, 8]"]


def test_two_readers_of_a_weight_are_found(graph) -> None:
    first = graph.weight_nodes()[0]
    with graph.module.graph.inserting_after(first):
        twin = graph.module.graph.get_attr("layer.weight")
    twin.meta["val"] = first.meta["val"]
    assert violations(graph) == ["weight 'layer.weight' is read by 2 nodes instead of one"]


def test_outputs_that_have_no_name_are_found(graph) -> None:
    graph.set_outputs([*graph.outputs, *graph.outputs], graph.signature)
    expected = "the graph has 2 outputs, its signature 1 names and a tree of 1"
    assert violations(graph) == [expected]


# ---- fake values --------------------------------------------------------------------------


def test_a_stale_shape_is_found(graph) -> None:
    weight = graph.weight_nodes()[0]
    graph.set_weight(weight, torch.zeros(5, WIDTH))
    said, computed = "is said to be float32[3, 8]", "but computes float32[3, 5]"
    expected = f"linear_default (aten.linear.default) {said}, {computed}"
    assert violations(graph)[0] == expected
    assert violations(graph, shapes=False) == []


def test_a_stale_dtype_is_found(graph) -> None:
    graph.set_weight(graph.weight_nodes()[0], torch.eye(WIDTH, dtype=torch.float64))
    expected = "linear_default (aten.linear.default) mixes float32 and float64"
    assert violations(graph) == [expected]


def test_operands_that_do_not_fit_are_found(graph) -> None:
    graph.set_weight(graph.weight_nodes()[0], torch.zeros(WIDTH, 5))
    assert violations(graph)[0].startswith(
        "linear_default (aten.linear.default) refuses its operands (RuntimeError: "
    )


def test_what_is_wrong_stays_wrong_when_it_is_checked_again(graph) -> None:
    verify(graph)
    graph.set_weight(graph.weight_nodes()[0], torch.zeros(5, WIDTH))
    assert violations(graph) == violations(graph) != []
    graph.set_weight(graph.weight_nodes()[0], torch.eye(WIDTH))
    verify(graph)


@settings(max_examples=25, deadline=None)
@given(programs(), st.data())
def test_a_wrong_fake_value_anywhere_is_found(program, data) -> None:
    graph = built(program)
    graph.finish()
    calls = [n for n in graph.nodes if n.op == "call_function"]
    if calls:
        place = data.draw(st.integers(0, len(calls) - 1))
        calls[place].meta["val"] = calls[place].meta["val"].new_empty(7, 2, 2)
        assert any(calls[place].name in text for text in violations(graph))


def test_looking_touches_nothing(graph) -> None:
    text, edits = str(graph), graph.edits
    metas = [dict(n.meta) for n in graph.nodes]
    verify(graph)
    assert (str(graph), graph.edits) == (text, edits)
    assert [n.meta for n in graph.nodes] == metas


def test_symbolic_sizes_are_compared_as_expressions(captured) -> None:
    graph = captured("bert")
    verify(graph)
    node = graph.blocks[1].exit
    graph.call(aten.relu.default, node, after=node)
    node.meta["val"] = node.meta["val"].new_empty(2, 7, 32)
    assert any(text.startswith(node.name) for text in violations(graph))


def test_verifying_again_takes_milliseconds(captured) -> None:
    graph = captured("llama-12")
    verify(graph)
    start = time.process_time()
    verify(graph.copy())
    # About 0.01 s alone; other work on the machine may slow the clock of the processor.
    assert time.process_time() - start < 0.15
