"""The strategies make what they say."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from lamella.ir.verify import violations
from tests.strategies import WIDTH, built, dags, evaluated, graph_of, programs, returned


@given(programs())
def test_programs_read_earlier_values_only(program) -> None:
    assert program
    for place, (_, left, right) in enumerate(program):
        assert 0 <= left <= place
        assert 0 <= right <= place


@given(dags())
def test_dags_have_no_cycles(sources) -> None:
    assert all(source < place for place, row in enumerate(sources) for source in row)


@settings(max_examples=15, deadline=None)
@given(programs())
def test_built_graphs_are_sound_once_finished(program) -> None:
    graph = built(program)
    graph.finish()
    assert violations(graph) == []


def test_a_new_graph_returns_its_first_input() -> None:
    x = torch.ones(3, WIDTH)
    graph = graph_of({"x": x, "y": x})
    assert graph(x=x * 2, y=x)["result"].sum() == 2 * x.numel()
    assert graph(x=x, y=x * 2)["result"].sum() == x.numel()
    assert returned(graph, graph.inputs[1])(x=x, y=x * 2)["result"].sum() == 2 * x.numel()


def test_a_program_is_evaluated_step_by_step() -> None:
    x = torch.full((3, WIDTH), -2.0)
    assert torch.equal(evaluated([("neg", 0, 0), ("mul", 1, 0)], x), torch.full((3, WIDTH), -4.0))
