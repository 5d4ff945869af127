"""ZD against the definition, on all weights of a block at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lamella.ir.graph import Graph
from lamella.passes.analyses.z_score_distribution import ZScoreDistribution
from lamella.passes.base import Analyses


def test_zd_is_the_share_of_weights_more_than_one_deviation_above_the_mean(
    captured: Callable[[str], Graph], model: Callable[[str], nn.Module]
):
    report = Analyses(captured("llama")).get(ZScoreDistribution())
    for index, layer in enumerate(model("llama").model.layers):
        weights = torch.cat([p.detach().flatten() for p in layer.parameters() if p.ndim > 1])
        z = (weights.double() - weights.double().mean()) / weights.double().std(correction=0)
        assert report.blocks[f"model.layers.{index}"] == float((z > 1).double().mean())
    weight = model("llama").model.layers[0].mlp.up_proj.weight.detach().double()
    own = float((weight > weight.mean() + weight.std(correction=0)).double().mean())
    assert report.weights["model.layers.0.mlp.up_proj.weight"] == own


def test_a_heavy_tail_lowers_the_share(captured: Callable[[str], Graph]):
    graph = captured("llama")
    before = Analyses(graph).get(ZScoreDistribution()).blocks["model.layers.0"]
    node = graph.weight_node("model.layers.0.mlp.up_proj.weight")
    weight = graph.weight(node).clone()
    weight[0, 0] = 100.0
    graph.set_weight(node, weight)
    after = Analyses(graph).get(ZScoreDistribution()).blocks["model.layers.0"]
    assert after < before / 100
    # A normal distribution has 15.9 % above one deviation.
    assert before == pytest.approx(0.159, abs=0.03)
