"""Static ranges of integer layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.torch.eager import EagerBackend
from lamella.errors import PassError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.integer_operators import static_range
from lamella.ir.ops import lam
from lamella.passes.base import Analyses
from lamella.passes.transforms.fix_ranges import FixRanges
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from lamella.rewrite.canonicalize import canonicalize

MODEL = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 33, bias=False))


def drawn(seed: int) -> Tensor:
    return torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(seed))


def integer_graph(activations: str) -> Graph:
    torch.manual_seed(0)
    for layer in (MODEL[0], MODEL[2]):
        nn.init.normal_(layer.weight, std=0.1)
    graph = capture_module(MODEL.eval(), (drawn(0),))
    canonicalize(graph)
    options = QuantizeWeights(bits=8, min_size=1, min_rows=0, activations=activations)
    options.run(graph, Analyses(graph))
    graph.finish()
    return graph


def fixed(*samples: Tensor, activations: str = "int8-tensor") -> tuple[Graph, Analyses]:
    graph = integer_graph(activations)
    analyses = Analyses(graph, samples=[{"input": sample} for sample in samples])
    FixRanges().run(graph, analyses)
    graph.finish()
    return graph, analyses


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_the_range_is_that_of_all_samples() -> None:
    graph, analyses = fixed(drawn(0), drawn(1))
    first, _ = graph.find(lam.linear_int8_static.default)
    both = torch.stack([drawn(0), drawn(1)])
    wanted = static_range(float(both.min()), float(both.max()))
    assert (graph.operand(first, "step"), graph.operand(first, "zero")) == wanted
    assert "2 layers have the ranges of the samples" in analyses.take_remarks()


def test_on_the_samples_nothing_is_lost() -> None:
    graph, _ = fixed(drawn(0))
    # The range of one batch is the range that the dynamic layer finds; of the second layer too.
    assert off(graph(drawn(0)), integer_graph("int8-tensor")(drawn(0))) < 1e-6
    # On others within the error of 8 bits.
    with torch.no_grad():
        assert off(graph(drawn(3)), MODEL(drawn(3))) < 0.03


@pytest.mark.parametrize("backend", [OnnxRuntimeBackend(), EagerBackend()], ids=["ort", "eager"])
def test_backends_compute_it(backend: OnnxRuntimeBackend | EagerBackend) -> None:
    graph, _ = fixed(drawn(0))
    # A tie moves one code of 64 by one step of 1/255 of the range.
    assert off(backend.lower(graph)(drawn(2)), graph(drawn(2))) < 2e-3


def test_layers_with_a_scale_for_each_row_stay() -> None:
    graph, analyses = fixed(drawn(0), activations="int8-rows")
    assert len(graph.find(lam.linear_int8.default)) == 2
    told = analyses.take_remarks()
    assert any("2 layers have a scale for each row" in one for one in told)
    assert any("no layer has one range for its input" in one for one in told)


def test_values_without_a_range_are_refused() -> None:
    wrong = drawn(0)
    wrong[0, 0, 0] = float("inf")
    with pytest.raises(PassError, match="values that have no range"):
        fixed(wrong)
