"""The contract of passes: caching that is never stale, remarks, statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from lamella.data import Samples
from lamella.errors import PassError, SamplesError
from lamella.ir.graph import Graph
from lamella.ir.reducers import Mean
from lamella.ir.runner import Request
from lamella.passes import base
from lamella.passes.base import Analyses, Analysis
from tests.unit.planted import CountLinears, Meddle, RoundToHalf, Shrink, network

IDS = {"input_ids": torch.tensor([[3, 1, 4], [1, 5, 9]])}


@dataclass(frozen=True)
class MeanOf(Analysis[torch.Tensor]):
    """The mean of the value of a node over the samples."""

    name: ClassVar[str] = "mean-of"

    node: str

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        return (Request.of(Mean(), self.node),)

    def run(self, graph: Graph, analyses: Analyses) -> torch.Tensor:
        (request,) = self.requests(graph)
        return analyses.statistics([request])[request]


@pytest.fixture
def runs() -> list[int]:
    CountLinears.runs.clear()
    return CountLinears.runs


def test_an_answer_is_computed_once_per_state_of_the_graph(runs: list[int]):
    graph = network()
    analyses = Analyses(graph)
    assert [analyses.get(CountLinears()) for _ in range(3)] == [3, 3, 3]
    assert runs == [0]
    assert analyses.get(CountLinears(offset=1)) == 4
    assert runs == [0, 1]
    Shrink().run(graph, analyses)
    assert analyses.get(CountLinears()) == 3
    assert runs == [0, 1, 0]


def test_an_answer_is_not_given_for_a_restored_graph(runs: list[int]):
    graph = network()
    saved, analyses = graph.copy(), Analyses(graph)
    analyses.get(CountLinears())
    graph.restore(saved)
    analyses.get(CountLinears())
    assert runs == [0, 0]


def test_an_analysis_that_edits_is_refused():
    with pytest.raises(PassError, match="analysis 'meddle' edited the graph"):
        Analyses(network()).get(Meddle())


def test_statistics_are_shared_and_not_computed_twice(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    real = base.run_requests

    def counting(graph: Graph, samples: Any, requests: Any, **more: Any) -> Any:
        asked.append(len(requests))
        return real(graph, samples, requests, **more)

    monkeypatch.setattr(base, "run_requests", counting)
    graph = network()
    relu, linear = (node.name for node in graph.find(torch.ops.aten.relu.default) * 2)
    names = [relu, graph.find(torch.ops.aten.layer_norm.default)[0].name]
    analyses = Analyses(graph, Samples.of([IDS]))
    first, second = analyses.get_all(*(MeanOf(name) for name in names))
    assert asked == [2]
    assert analyses.get(MeanOf(linear)) is first
    assert asked == [2]
    assert first.shape == (32,)
    assert second.shape == (16,)
    RoundToHalf().run(graph, analyses)
    analyses.get(MeanOf(relu))
    assert asked == [2, 1]


def test_samples_are_asked_for_by_name():
    graph = network()
    relu = graph.find(torch.ops.aten.relu.default)[0].name
    with pytest.raises(SamplesError, match="analysis 'mean-of' needs data") as caught:
        Analyses(graph).get(MeanOf(relu))
    assert f"in analysis 'mean-of node={relu}'" in caught.value.__notes__


def test_remarks_are_collected_once_and_are_errors_when_strict():
    analyses = Analyses(network())
    analyses.remark("layer x was left as it was")
    analyses.remark("layer x was left as it was")
    analyses.note("chose 4 bits")
    assert analyses.take_remarks() == ("layer x was left as it was", "chose 4 bits")
    assert analyses.take_remarks() == ()
    strict = Analyses(network(), strict=True)
    strict.note("chose 4 bits")
    with pytest.raises(PassError, match=r"layer x was left as it was .*strict=True"):
        strict.remark("layer x was left as it was")


def test_a_pass_describes_itself():
    (option,) = Shrink.describe()
    assert (option.name, option.type, option.default) == ("factor", "number", "0.5")
    assert Shrink(0.25).spelling == "shrink factor=0.25"
    assert Shrink().spelling == "shrink"
