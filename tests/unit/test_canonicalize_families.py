"""Whole models: canonical, unchanged by a second run, fast, with the operators one expects."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lamella.ir.capture import capture_module
from lamella.rewrite.canonical.attention import attention_from_softmax
from lamella.rewrite.canonicalize import canonicalize, noncanonical
from tests.conftest import family_of
from tests.unit.written import check_values, operators

aten = torch.ops.aten

# Operators of the blocks, for three blocks (swin: two stages of two).
EXPECTED = {
    "llama": {"rms_norm": 7, "rotary_embedding": 6, "scaled_dot_product_attention": 3, "silu": 3},
    "mixtral": {"rms_norm": 7, "grouped_linear": 6, "histc": 3, "softmax": 3, "topk": 3},
    "gemma2": {"rms_norm": 13, "rotary_embedding": 6, "softmax": 3, "tanh": 4, "gelu": 3},
    "gpt2": {"layer_norm": 7, "linear": 13, "gelu": 3, "scaled_dot_product_attention": 3},
    "swin": {"layer_norm": 11, "scaled_dot_product_attention": 4, "gelu": 4},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_operators_of_a_family(name: str, captured) -> None:
    graph = captured(name)
    counts = operators(graph)
    assert noncanonical(graph) == {}
    assert {op: counts.get(op) for op in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_second_run_changes_nothing(name: str, captured) -> None:
    graph = captured(name)
    code, edits = graph.module.code, graph.edits
    report = canonicalize(graph)
    assert not any(report.counts.values()), report.counts
    assert report.nodes_before == report.nodes_after
    assert (graph.module.code, graph.edits) == (code, edits)


def test_no_symbol_becomes_another(raw) -> None:
    graph = raw("llama")
    known = dict(graph.fake_mode().shape_env.replacements)
    canonicalize(graph)
    assert graph.fake_mode().shape_env.replacements == known
    check_values(graph)


def test_a_soft_cap_is_explained(captured) -> None:
    graph = captured("gemma2")
    report = canonicalize(graph)
    assert [miss.rule for miss in report.near_misses] == ["attention_from_softmax"] * 3
    root = next(node for node in graph.nodes if node.name == report.near_misses[0].node)
    assert "(aten.tanh.default), which is neither a factor nor a mask" in (
        attention_from_softmax.explain(graph, root)
    )


def test_new_nodes_know_their_rule_and_their_module(captured) -> None:
    graph = captured("llama")
    (norm, *_) = graph.find(aten.rms_norm.default)
    assert norm.meta["author"] == "rms_norm_with_weight"
    stack = norm.meta["nn_module_stack"]
    assert any("input_layernorm" in str(entry) for entry in stack.values())


def test_twelve_blocks_take_less_than_a_second() -> None:
    known = family_of("llama")
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=99,
        use_cache=False,
    )
    graph = capture_module(LlamaForCausalLM(config), known.inputs())
    assert len(graph.nodes) > 900
    start = time.process_time()
    canonicalize(graph)
    seconds = time.process_time() - start
    assert operators(graph)["scaled_dot_product_attention"] == 12
    # It takes a third of that on two cores of 2024; other work must not make the test fail.
    assert seconds < 2.0
