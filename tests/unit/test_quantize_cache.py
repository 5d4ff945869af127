"""Caches of codes: scales against the caches of transformers, tokens against the whole graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lamella
from lamella.errors import PassError, SamplesError
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.passes.base import Analyses
from lamella.passes.transforms.quantize_cache import QuantizeCache
from lamella.rewrite.incremental import incremental
from tests.conftest import family_of
from tests.unit import test_checkpoint_genai as genai

NEW = 10
FUSED = ("llama", "qwen3", "gemma3", "gpt2", "opt")
"""Decoders whose attentions are one operator."""


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (3, 2, 20), generator=generator)
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


PROMPT = samples()[0]["input_ids"][:1, :6]


def model_of(name: str) -> Any:
    model: Any = family_of(name).build()
    model.config.use_cache = True
    model.generation_config.update(eos_token_id=None, pad_token_id=0, use_cache=True)
    return model


def quantized(model: Any) -> Graph:
    graph = lamella.capture(model)
    lamella.transform(graph, ["quantize-cache"], samples=samples())
    return graph


def greedy(graph: Graph) -> list[int]:
    """Tokens by the graph of whole sequences, from the start for every token."""
    tokens = PROMPT
    for _ in range(NEW):
        logits = graph(input_ids=tokens, attention_mask=torch.ones_like(tokens))["logits"]
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    return tokens[0].tolist()


def test_scales_are_the_largest_keys_and_values_of_transformers():
    model = model_of("llama")
    graph = quantized(model)
    caches = [model(**one, use_cache=True).past_key_values for one in samples()]
    for layer, attention in enumerate(
        graph.find(torch.ops.aten.scaled_dot_product_attention.default)
    ):
        for name in ("key", "value"):
            scale = graph.weight(graph.operand(graph.operand(attention, name), "scale"))
            rows = torch.cat([getattr(c.layers[layer], f"{name}s") for c in caches])
            largest = rows.abs().amax((0, 2)).unsqueeze(1)
            # Two traces of the same sums.
            torch.testing.assert_close(scale, largest / 127, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("backend", ["onnxruntime", "eager"])
def test_what_is_generated_is_what_the_whole_graph_says(name: str, backend: str):
    """The cache holds codes; the graph of whole sequences rounds and forgets them."""
    graph = quantized(model_of(name))
    compiled = lamella.lower(graph, backend)
    got = compiled.generate(input_ids=PROMPT, max_new_tokens=NEW, do_sample=False)
    assert got[0].tolist() == greedy(graph)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_padded_batch_generates_what_its_rows_alone_do(name: str):
    compiled = lamella.lower(quantized(model_of(name)), "onnxruntime")
    long = samples()[1]["input_ids"][:1, :6]
    short = torch.cat((torch.zeros(1, 2, dtype=torch.int64), long[:, 2:]), 1)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    both = compiled.generate(
        input_ids=torch.cat((long, short)), attention_mask=mask, max_new_tokens=NEW, do_sample=False
    )
    for row, alone in ((both[0], long), (both[1, 2:], long[:, 2:])):
        wanted = compiled.generate(input_ids=alone, max_new_tokens=NEW, do_sample=False)[0]
        assert row.tolist() == wanted.tolist()


def test_every_slot_holds_codes_and_the_cost_counts_them():
    model = model_of("llama")
    plain, graph = lamella.capture(model), quantized(model)
    layout = incremental(graph).step.cache
    assert layout is not None
    assert {slot.dtype for slot in layout.slots} == {"int8"}
    before, after = (
        lamella.analyze(g, "cost").at(batch=1, sequence=64).total.cache_bytes
        for g in (plain, graph)
    )
    assert after * 4 == before


def test_the_runner_of_genai_reads_codes(tmp_path: Path):
    graph = quantized(model_of("llama"))
    lamella.save_checkpoint(graph, tmp_path / "out", format="onnxruntime-genai")
    compiled = lamella.lower(graph, "onnxruntime")
    options = {"max_new_tokens": genai.NEW, "do_sample": False}
    wanted = compiled.generate(input_ids=genai.PROMPT, **options)[0].tolist()
    got = genai.generated(tmp_path / "out")
    # Only one of the two repeats the token that ends the text.
    assert got == wanted[: len(got)]
    assert len(wanted) - len(got) <= 1


def test_dropped_blocks_have_no_scales():
    graph = quantized(model_of("llama"))
    lamella.transform(graph, ["drop-blocks blocks=1"])
    found = graph.find(lam.round_uniform.default)
    attentions = graph.find(torch.ops.aten.scaled_dot_product_attention.default)
    assert len(found) == 2 * len(attentions)
    held = [node.target for node in graph.weight_nodes() if "cache." in str(node.target)]
    assert len(held) == len(found) + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_channels_that_are_always_zero_stay_zero(dtype: torch.dtype):
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
    graph = quantized(model.to(dtype))
    mask = torch.ones_like(PROMPT)
    assert graph(input_ids=PROMPT, attention_mask=mask)["logits"].isfinite().all()


# ---- bad input --------------------------------------------------------------------------


def test_an_encoder_keeps_nothing():
    graph = lamella.capture(family_of("bert").build())
    with pytest.raises(PassError, match="no attention is causal self-attention"):
        lamella.transform(graph, ["quantize-cache"], samples=samples())


def test_values_that_overflow_are_named():
    graph = lamella.capture(model_of("llama"))
    weight = graph.weight_node("model.layers.0.self_attn.v_proj.weight")
    graph.set_weight(weight, graph.weight(weight) * float("inf"))
    with pytest.raises(SamplesError, match=r"entries that are NaN or infinite"):
        QuantizeCache().run(graph, Analyses(graph, samples()))


def test_it_runs_once():
    graph = quantized(model_of("llama"))
    with pytest.raises(PassError, match="every cache is rounded already"):
        lamella.transform(graph, ["quantize-cache"], samples=samples())


def test_samples_are_needed():
    with pytest.raises(SamplesError, match="quantize-cache"):
        lamella.transform(lamella.capture(model_of("llama")), ["quantize-cache"])


def test_attentions_that_are_written_out_are_named():
    graph = lamella.capture(model_of("gemma2"))
    with pytest.raises(PassError, match="causal self-attention as one operator"):
        lamella.transform(graph, ["quantize-cache"], samples=samples())
