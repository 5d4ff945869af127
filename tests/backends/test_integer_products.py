"""Models whose linear layers multiply integers: every backend gives what the graph gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from lamella.backends.onnxruntime.files import MODEL, save_model
from lamella.backends.onnxruntime.session import Session
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.backends.torch.eager import EagerBackend
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.passes.base import Analyses
from lamella.passes.transforms.quantize_weights import QuantizeWeights

FAMILIES = ["bert", "vit", "gpt2", "llama"]


def integer_graph(graph: Graph, activations: str) -> Graph:
    QuantizeWeights(bits=8, min_size=0, activations=activations).run(graph, Analyses(graph))
    graph.finish()
    assert len(graph.find(lam.linear_int8.default)) > 5
    return graph


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("activations", ["int8-rows", "int8-tensor"])
def test_onnxruntime_gives_what_the_graph_gives(
    name: str,
    activations: str,
    tmp_path: Path,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
):
    graph, inputs = integer_graph(captured(name), activations), sample_inputs(name)
    save_model(write_onnx(graph), tmp_path)
    optimized = tmp_path / "optimized.onnx"
    session = Session(tmp_path / MODEL, threads=1, optimized=optimized)
    feeds = {key: value for key, value in inputs.items() if key in session.inputs}
    got = session.run(feeds, session.outputs)[0]
    # Sums of integers are exact. What comes between them differs by roundings of float32, which
    # move a code at a tie, by one step of 1/127, once in a while.
    assert off(got, graph(**inputs)[0]) < 5e-3
    kinds = operators(optimized)
    layers = len(graph.find(lam.linear_int8.default))
    assert kinds["MatMulIntegerToFloat"] + kinds["DynamicQuantizeMatMul"] == layers


def operators(path: Path) -> Counter[str]:
    """How often each operator is in a file."""
    return Counter(n.op_type for n in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize("activations", ["none", "int8-rows", "int8-tensor"])
def test_sums_and_layer_norms_stay_apart(
    name: str,
    activations: str,
    tmp_path: Path,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
):
    graph = captured(name)
    if activations != "none":
        integer_graph(graph, activations)
    save_model(write_onnx(graph), tmp_path)
    optimized = tmp_path / "optimized.onnx"
    Session(tmp_path / MODEL, threads=1, optimized=optimized)
    norms = len(graph.find(torch.ops.aten.layer_norm.default))
    # The fused kernel takes five times as long as the sum and the norm of it.
    assert operators(optimized)["LayerNormalization"] == norms
    assert operators(optimized)["SkipLayerNormalization"] == 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("activations", ["int8-rows", "int8-tensor"])
def test_eager_gives_what_the_graph_gives(
    name: str,
    activations: str,
    captured: Callable[[str], Graph],
    sample_inputs: Callable[..., dict[str, Tensor]],
):
    graph, inputs = integer_graph(captured(name), activations), sample_inputs(name)
    executable = EagerBackend().lower(graph)
    got = next(iter(executable(**inputs).values()))
    # Integers of this size are exact in float32 as well; a tie may fall otherwise, as above.
    assert off(got, graph(**inputs)[0]) < 5e-3
    # The files hold one byte for each weight, not four.
    codes = sum(graph.weight(graph.operand(n, "weight")).numel()
                for n in graph.find(lam.linear_int8.default))  # fmt: skip
    assert executable.weight_bytes < graph.weight_bytes() + codes // 4
    assert torch.isfinite(got).all()
