"""Attention over buffers with all scores at once: what is written, and what comes out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lamella
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.decoder import OnnxDecoder
from lamella.backends.onnxruntime.emission import Caches
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.backends.torch.eager import EagerBackend
from lamella.ir.graph import Graph
from lamella.rewrite.incremental import incremental
from tests.backends.test_cached_attention import CLOSE, FORMS, graph_for, tokens_of
from tests.backends.test_cached_decoder import assert_near

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
MODELS = {
    "biases": (Qwen2ForCausalLM, Qwen2Config),
    "norms of queries": (Qwen3ForCausalLM, Qwen3Config),
    "capped scores": (Gemma2ForCausalLM, Gemma2Config),
}
CODES = {
    "symmetric": "min_size=1",
    "with zeros": "min_size=1 symmetric=false",
    "queries alone": "min_size=4096",
}
"""The last leaves keys and values, which are smaller, in floats: queries are a product apart."""


def quantized(model: str, codes: str) -> Graph:
    """One step of a model whose layers hold codes; activations are floats."""
    make, config = MODELS[model]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = lamella.capture(make(config(**SIZES)).eval())
    options = f"bits=4 int8_activations=false {CODES[codes]}"
    lamella.transform(graph, [f"quantize-weights {options}"])
    return incremental(graph).step


def written(step: Graph, caches: Caches = Caches.BOUND) -> list[ir.Node]:
    return list(write_onnx(step, caches=caches).graph)


def attentions(nodes: list[ir.Node]) -> list[ir.Node]:
    return [node for node in nodes if node.op_type == "GroupQueryAttention"]


def has_sink(node: ir.Node) -> bool:
    return len(node.inputs) > 11 and node.inputs[11] is not None


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("model", MODELS)
def test_scaled_queries_give_the_same_logits(model: str, codes: str):
    step = quantized(model, codes)
    ours, theirs = OnnxRuntimeBackend(threads=1).decoder(step), EagerBackend().decoder(step)
    assert isinstance(ours, OnnxDecoder)
    one, two = ours.start(2), theirs.start(2)
    tokens = torch.randint(3, 60, (2, 13), generator=torch.Generator().manual_seed(4))
    for given in tokens.split((6, 1, 1, 4, 1), dim=1):
        assert_near(ours.step(one, given), theirs.step(two, given))


def test_factors_are_part_of_the_codes_where_queries_come_from_them():
    nodes = written(quantized("biases", "symmetric"))
    # Queries, keys and values in one product, and those of the output, gate and up, and down.
    assert Counter(node.op_type for node in nodes)["MatMulNBits"] == 2 * 4 + 1
    for node in attentions(nodes):
        assert has_sink(node)
        product = node.inputs[0].producer()
        assert product.op_type == "MatMulNBits"
        assert [product.inputs[place].producer().op_type for place in (2, 5)] == ["Mul", "Mul"]


def test_factors_are_multiplied_where_something_else_was_done_to_queries():
    for node in attentions(written(quantized("norms of queries", "symmetric"))):
        assert node.inputs[0].producer().op_type == "Mul"
        assert node.attributes["scale"].as_float() == 1


def test_a_product_that_is_read_elsewhere_is_written_once():
    step = quantized("biases", "symmetric")
    query = next(iter(step.find(torch.ops.lamella.cached_attention.default))).all_input_nodes[0]
    while query.target is not torch.ops.lamella.linear_nbits.default:
        query = query.all_input_nodes[0]
    step.output.args = ((*step.outputs, query),)
    names = (*step.signature.outputs, "queries")
    step.signature = dataclasses.replace(step.signature, outputs=names)
    nodes = written(step)
    assert Counter(node.op_type for node in nodes)["MatMulNBits"] == 2 * 4 + 1
    makers = [node.inputs[0].producer().op_type for node in attentions(nodes)]
    assert makers == ["Mul", "MatMulNBits"]


@pytest.mark.parametrize("form", FORMS)
def test_tile_by_tile_when_the_scores_have_no_room(form: str, monkeypatch):
    monkeypatch.setattr("lamella.backends.onnxruntime.emit.scores_at_once.is_fit", lambda *_: False)
    step = graph_for(form)
    assert not any(map(has_sink, attentions(written(step))))
    ours, theirs = OnnxRuntimeBackend(threads=1).decoder(step), EagerBackend().decoder(step)
    one, two = ours.start(2, 4), theirs.start(2)
    for given in tokens_of(2, 9).split((4, 1, 3, 1), dim=1):
        torch.testing.assert_close(ours.step(one, given), theirs.step(two, given), **CLOSE)


@pytest.mark.parametrize(("longest", "shared"), [(1024, True), (4096, True), (4097, False)])
def test_whole_prompts_need_room(longest: int, shared: bool):
    """Runners read a prompt in one call: 2**28 bytes hold 4,096 by 4,096 scores of 4 heads."""
    step = graph_for("grouped")
    kept = step.origin
    step.origin = dataclasses.replace(kept, config={"max_position_embeddings": longest})
    try:
        for caches, wanted in ((Caches.BOUND, True), (Caches.SHARED, shared)):
            assert [has_sink(node) for node in attentions(written(step, caches))] == [wanted]
    finally:
        step.origin = kept


def test_a_cache_of_codes_goes_tile_by_tile():
    assert not any(map(has_sink, attentions(written(graph_for("codes")))))
