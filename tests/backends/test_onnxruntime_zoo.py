"""All families through ONNX Runtime, at the captured and at other sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.files import MODEL, save_model
from lamella.backends.onnxruntime.writer import unsupported, write_onnx
from lamella.ir.graph import Graph
from lamella.ir.onnx import read_onnx
from lamella.ir.torch_private import tree_leaves
from lamella.rewrite.canonicalize import canonicalize
from tests.zoo.families import FAMILIES

TOLERANCE = 1e-4
"""Of the largest entry of an output; two libraries order float32 sums in their own ways."""


def assert_runs_like(
    model: nn.Module, graph: Graph, backend: OnnxRuntimeBackend, name: str
) -> None:
    """The executable gives what the model gives, in the model's output type."""
    executable, family = backend.lower(graph), FAMILIES[name]
    for batch, sequence in family.sizes():
        inputs = family.inputs(batch, sequence)
        with torch.no_grad():
            expected = model(**inputs)
        got = executable(**inputs)
        assert type(got) is type(expected)
        for mine, theirs in zip(tree_leaves(got), tree_leaves(expected), strict=True):
            if not isinstance(theirs, Tensor):
                assert mine == theirs
                continue
            assert mine.dtype == theirs.dtype
            atol = TOLERANCE * float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_runs_like_pytorch(
    name: str, model: Callable[[str], nn.Module], captured: Callable[[str], Graph]
):
    backend = OnnxRuntimeBackend(threads=1)
    assert_runs_like(model(name), captured(name), backend, name)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "bert", "deberta-v2", "t5", "swin"])
def test_a_family_runs_like_pytorch_in_older_operators(
    name: str, model: Callable[[str], nn.Module], captured: Callable[[str], Graph]
):
    """Opset 21 has no attention; without contrib operators any runtime can run the file."""
    backend = OnnxRuntimeBackend(threads=1, opset=21, contrib=False)
    graph = captured(name)
    assert set(write_onnx(graph, opset=21, contrib=False).opset_imports) == {""}
    assert_runs_like(model(name), graph, backend, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_survives_writing_and_reading(
    name: str, captured: Callable[[str], Graph], tmp_path: Path
):
    graph, family = captured(name), FAMILIES[name]
    save_model(write_onnx(graph), tmp_path)
    again = read_onnx(tmp_path / MODEL)
    canonicalize(again)
    assert unsupported(again) == {}
    for batch, sequence in family.sizes():
        inputs = family.inputs(batch, sequence)
        expected, got = graph(**inputs), again(**inputs)
        pairs = zip(tree_leaves(got), tree_leaves(expected), strict=True)
        for mine, theirs in (pair for pair in pairs if isinstance(pair[1], Tensor)):
            atol = TOLERANCE * float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_of_a_family_is_unsupported(name: str, captured: Callable[[str], Graph]):
    assert unsupported(captured(name)) == {}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral"])
def test_attention_with_rotary_embedding_needs_no_transposition(
    name: str, captured: Callable[[str], Graph]
):
    kinds = Counter(node.op_type for node in write_onnx(captured(name)).graph)
    assert kinds["Attention"] == 3
    assert kinds["RotaryEmbedding"] == 2 * 3
    # One for the table of angles.
    assert kinds["Transpose"] <= 1


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "opt", "whisper"])
def test_attention_without_rotary_embedding_needs_no_transposition(
    name: str, captured: Callable[[str], Graph]
):
    kinds = Counter(node.op_type for node in write_onnx(captured(name)).graph)
    attentions = len(captured(name).find(torch.ops.aten.scaled_dot_product_attention.default))
    assert kinds["Attention"] == attentions
    # Patches become tokens (vision, audio) by one.
    assert kinds["Transpose"] <= 1
