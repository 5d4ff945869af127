"""Relevance as a score: norms behind the sum, two streams, experts, convolutions and scans."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.passes.base import Analyses
from lamella.passes.scores.lrp_qvit import LrpQvit
from lamella.passes.scores.relevance import RelevanceScore
from lamella.passes.scores.relevance_bits import RelevanceBits
from lamella.passes.sites import find_sites

Captured = Callable[[str], Graph]
SampleInputs = Callable[..., dict[str, Tensor]]


@pytest.mark.parametrize("kind", ["bert", "t5", "mixtral", "resnet", "mamba"])
def test_every_part_has_a_score(kind: str, captured: Captured, sample_inputs: SampleInputs):
    graph = captured(kind)
    analyses = Analyses(graph, Samples.of([sample_inputs(kind, 2)]))
    parts = analyses.get(RelevanceScore("sublayer", sequences=1)).values
    droppable = [part.name for part in graph.stream.sublayers if part.droppable]
    assert list(parts) == droppable
    # A part whose every entry is replaced by its mean has no effect; none is one.
    assert all(value > 0 for value in parts.values())
    f = Format(4)
    losses = analyses.get(RelevanceBits((f,), sequences=1, draws=1)).losses
    shares = analyses.get(LrpQvit((f,), sequences=1)).losses
    assert list(losses) == list(shares) == [site.weight for site in find_sites(graph)]
    assert all(one[f] >= 0 for one in (*losses.values(), *shares.values()))
    assert sum(one[f] > 0 for one in losses.values()) >= 0.8 * len(losses)
