"""Relevance of graphs whose weights are stored in few bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.passes.base import Analyses
from lamella.passes.relevance.emit import RelevanceGraph, emit
from lamella.passes.relevance.request import Request
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from lamella.rules.relevance.presets import PRESETS
from tests.zoo.families import FAMILIES

Captured = Callable[[str], Graph]


def quantized(graph: Graph, **options: int) -> Graph:
    QuantizeWeights(min_size=0, **options).run(graph, Analyses(graph))
    graph.finish()
    return graph


def relevance(graph: Graph, inputs: dict[str, Tensor]) -> tuple[RelevanceGraph, dict[str, Tensor]]:
    made = emit(graph, PRESETS["attnlrp"], Request(seed=lambda output: output, ledger=True))
    return made, made.graph(**inputs)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_seen_through(bits: int, captured: Captured):
    """The sweep multiplies by the weights that the codes stand for; the ledger closes."""
    few, inputs = quantized(captured("llama"), bits=bits), FAMILIES["llama"].inputs()
    assert few.find(lam.linear_nbits.default)
    made, got = relevance(few, inputs)
    assert made.graph.find(lam.dequantize_nbits.default)
    rest = got["start"] - got["ledger.inputs"].sum() - got["ledger.leaks"].sum()
    # In float32.
    assert abs(float(rest / got["start"])) < 1e-4
    causes = {entry.cause for entry in made.ledger if "linear_nbits" in entry.operator}
    assert causes == {"rounding"}


def test_the_sweep_is_that_of_dense_weights(captured: Captured):
    """For a single layer, where the forward does not matter."""
    dense = captured("vit")
    few = quantized(captured("vit"), bits=8)
    inputs = FAMILIES["vit"].inputs()
    seed = torch.eye(5)[[1, 3]]
    rounded = dense.copy()
    plain = emit(rounded, PRESETS["attnlrp"]).graph(**inputs, seed=seed)["relevance.pixel_values"]
    coarse = emit(few, PRESETS["attnlrp"]).graph(**inputs, seed=seed)["relevance.pixel_values"]
    # Eight bits in every layer change a few percent.
    assert float((plain - coarse).norm() / plain.norm()) < 0.05


def test_quantized_relevance_runs_in_onnxruntime(captured: Captured):
    few, inputs = quantized(captured("llama"), bits=4), FAMILIES["llama"].inputs()
    made, want = relevance(few, inputs)
    got = OnnxRuntimeBackend(threads=1).lower(made.graph)(**inputs)
    key = "relevance.input_ids"
    # The kernels for few bits round activations to eight bits as the graph says.
    atol = 2e-2 * float(want[key].abs().max())
    torch.testing.assert_close(got[key], want[key], rtol=0, atol=atol)
