"""Bisection finds a planted edit, in few evaluations, and leaves the graph alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.errors import PassError
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.bisect import bisect, verifies, within_loss
from tests.unit.planted import Nothing, RoundToHalf, ScaleBack, WrongShape, network

IDS = {"input_ids": torch.tensor([[3, 1, 4], [1, 5, 9]])}


@dataclass(frozen=True)
class ManyEdits(Transform):
    """Harmless edits with one bad one among them."""

    name: ClassVar[str] = "many-edits"
    effect: ClassVar[Effect] = Effect.EXACT

    edits: int = 10
    bad: int = 7

    def run(self, graph: Graph, analyses: Analyses) -> None:
        for number in range(1, self.edits + 1):
            name = "head.bias" if number == self.bad else "up.bias"
            node = graph.weight_node(name)
            offset = 50.0 * torch.arange(len(graph.weight(node))) if number == self.bad else 0.0
            graph.set_weight(node, graph.weight(node) + offset)


@dataclass(frozen=True)
class FailAfter(Transform):
    """Some edits, then an error."""

    name: ClassVar[str] = "fail-after"
    effect: ClassVar[Effect] = Effect.EXACT

    edits: int = 3

    def run(self, graph: Graph, analyses: Analyses) -> None:
        ManyEdits(self.edits, bad=0).run(graph, analyses)
        raise KeyError("planted")


@settings(max_examples=12)
@given(st.integers(1, 5), st.integers(1, 24), st.data())
def test_the_edit_is_found_in_logarithmic_time(count: int, edits: int, data: st.DataObject):
    place, bad = data.draw(st.integers(0, count - 1)), data.draw(st.integers(1, edits))
    passes = [ManyEdits(3, bad=0)] * count
    passes[place] = ManyEdits(edits, bad)
    graph = network()
    before = graph.edits
    report = bisect(graph, passes, within_loss(graph, 1e-3))
    assert (report.index, report.number, report.edits) == (place, bad, edits)
    assert report.spelling == passes[place].spelling
    assert report.edit is not None
    assert (report.edit.action, report.edit.operator) == ("set_weight", "head.bias")
    assert report.edit.author == "many-edits"
    assert report.evaluations <= 2 + math.ceil(math.log2(count)) + math.ceil(math.log2(edits))
    assert graph.edits == before


def test_a_good_pipeline_is_said_to_be_good():
    graph = network()
    report = bisect(graph, [Nothing(), RoundToHalf()], within_loss(graph, 1e-2, [IDS]))
    assert report.spelling is None
    assert str(report) == "the check holds after all passes (2 evaluations)"


def test_a_pass_that_raises_is_the_culprit():
    graph = network()
    report = bisect(lambda: graph, [Nothing(), FailAfter(3)], within_loss(graph, 1e-2))
    assert (report.index, report.number, report.edits) == (1, 3, 3)
    assert report.error == "KeyError: 'planted'"
    assert "pass 2, 'fail-after', edit 3 of 3: set_weight of up_bias" in str(report)


def test_a_broken_pass_before_one_that_raises_comes_first():
    graph = network()
    report = bisect(graph, [ManyEdits(4, 2), FailAfter()], within_loss(graph, 1e-2))
    assert (report.index, report.number, report.error) == (0, 2, None)


def test_the_verifier_is_a_check():
    report = bisect(network(), [ScaleBack(), WrongShape()], verifies)
    assert (report.spelling, report.number) == ("wrong-shape", 1)
    assert report.edit is not None
    assert report.edit.operator == "down.weight"


def test_any_question_is_a_check():
    def asks(graph: Graph) -> bool:
        return bool(graph.find(aten.relu.default)) and float(graph.weight("up.bias")[0]) != 0

    report = bisect(network(), [ManyEdits(2, 0), ZeroBias()], asks)
    assert (report.spelling, report.number, report.edits) == ("zero-bias", 1, 1)


@dataclass(frozen=True)
class ZeroBias(Transform):
    """Set the bias to zero."""

    name: ClassVar[str] = "zero-bias"
    effect: ClassVar[Effect] = Effect.LOSSY

    def run(self, graph: Graph, analyses: Analyses) -> None:
        node = graph.weight_node("up.bias")
        graph.set_weight(node, graph.weight(node) * 0)


def test_a_check_that_fails_from_the_start_is_refused():
    with pytest.raises(PassError, match="fails before the first pass"):
        bisect(network(), [Nothing()], lambda graph: False)
