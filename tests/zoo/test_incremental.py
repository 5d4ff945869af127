"""Every family that generates computes in chunks, with a cache, what it computes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.errors import IncrementalError
from lamella.ir import ops
from lamella.ir.cache import CacheLayout
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.verify import verify
from lamella.passes.base import Analyses
from lamella.passes.transforms.drop_blocks import DropBlocks
from lamella.rewrite.canonicalize import canonicalize
from lamella.rewrite.incremental import Incremental, incremental

DECODERS = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "opt", "mixtral"),
    *("qwen3_moe", "mamba", "mamba2"),
)
SEQ2SEQ = ("t5", "bart", "whisper")
CHUNKS = (5, 1, 2, 1, 3)
# Chunks add up in another order than whole sequences do: rounding of float32.
TOLERANCE = 2e-6

lam = torch.ops.lamella


def run_in_chunks(parts: Incremental, given: dict[str, Tensor]) -> Tensor:
    """Logits of all tokens, read in chunks; written apart from the decoders of the backends."""
    step, layout = parts.step, layout_of(parts)
    if parts.once is not None:
        once = parts.once(**{name: given[name] for name in parts.once.signature.inputs})
        given = given | {name: once[name] for name in layout.once}
    tokens = given[layout.tokens]
    whole = torch.ones_like(tokens)
    if parts.once is None:
        whole = given.get(layout.mask, whole)
    cache = {
        slot.input: torch.zeros(len(tokens), *(max(size, 0) for size in slot.shape))
        for slot in layout.slots
    }
    logits: list[Tensor] = []
    done = 0
    for new in CHUNKS:
        mask = whole[:, : done + new]
        feeds: dict[str, Any] = {**given, **cache, layout.mask: mask}
        feeds[layout.tokens] = tokens[:, done : done + new]
        if layout.positions is not None:
            index = torch.arange(done + new).expand(len(tokens), -1)
            counted = mask.cumsum(1) * mask - 1
            places = index if layout.positions_from == "index" else counted
            feeds[layout.positions] = places[:, done:]
        results = step(**{name: feeds[name] for name in step.signature.inputs})
        cache = {slot.input: results[slot.output] for slot in layout.slots}
        logits.append(results[layout.logits])
        done += new
    return torch.cat(logits, dim=1)


def layout_of(parts: Incremental) -> CacheLayout:
    assert parts.step.cache is not None
    return parts.step.cache


def samples(sample_inputs: Callable[..., dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    """Inputs with as many tokens as the chunks have."""
    given = sample_inputs(name, 2, sum(CHUNKS), 1)
    if "decoder_input_ids" in given:
        generator = torch.Generator().manual_seed(2)
        given["decoder_input_ids"] = torch.randint(3, 99, (2, sum(CHUNKS)), generator=generator)
    return given


def assert_same(whole: Graph, parts: Incremental, given: dict[str, Tensor]) -> None:
    wanted = whole(**given).logits
    got = run_in_chunks(parts, given)
    assert float((wanted - got).abs().max()) <= TOLERANCE * float(wanted.abs().max())


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_chunks_with_a_cache_give_the_logits_of_the_whole(captured, sample_inputs, name):
    graph = captured(name)
    parts = incremental(graph)
    verify(parts.step)
    assert_same(graph, parts, samples(sample_inputs, name))


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_a_dropped_block_leaves_no_slot_and_no_gap(captured, sample_inputs, name):
    graph = captured(name)
    before = layout_of(incremental(graph))
    first = next(block.index for block in graph.blocks if block.stack != "encoder")
    DropBlocks(blocks=(first,)).run(graph, Analyses(graph))
    graph.finish()
    parts = incremental(graph)
    layout = layout_of(parts)
    layers = [slot.layer for slot in layout.slots]
    assert len(layout.slots) == len(before.slots) * 2 // 3
    assert sorted(set(layers)) == [0, 1]
    assert_same(graph, parts, samples(sample_inputs, name))


def test_masks_become_windows_and_padding(captured):
    # Window, whether the mask of the tokens is read, whether nothing is added to the scores.
    full, windowed = (0, True, True), (8, True, True)
    assert said(captured("llama")) == {full}
    assert said(captured("mistral")) == {windowed}
    assert said(captured("gemma2")) == {full, windowed}
    assert said(captured("gemma3")) <= {full, windowed}
    assert said(captured("t5")) == {(0, True, False)}


def said(graph: Graph) -> set[tuple[int, bool, bool]]:
    step = incremental(graph).step
    found = [ops.bind(node) for node in step.find(lam.cached_attention.default)]
    return {(one["window"], one["mask"] is not None, one["bias"] is None) for one in found}


def test_positions_of_new_tokens_alone_are_computed(captured):
    step = incremental(captured("gpt2")).step
    tables = [n for n in step.find(torch.ops.aten.embedding.default) if "wpe" in str(n.args[0])]
    assert [str(node.args[1].target) for node in tables] == ["position_ids"]


@pytest.mark.parametrize(
    ("name", "limit"),
    # 98 rows in the tables of opt and bart, the first two of which no token has.
    [("gpt2", 96), ("opt", 96), ("bart", 96), ("whisper", 96), ("llama", None), ("t5", None)],
)
def test_tables_say_how_many_positions_there_are(captured, name, limit):
    assert layout_of(incremental(captured(name))).positions_limit == limit


def test_a_mask_that_tokens_are_multiplied_by_is_cut_to_the_new_ones(model, sample_inputs):
    given = sample_inputs("mamba", 2, sum(CHUNKS), 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][1, :3] = 0
    graph = capture_module(model("mamba"), given)
    canonicalize(graph)
    assert_same(graph, incremental(graph), given)


@pytest.mark.parametrize("name", ["bert", "vit", "resnet"])
def test_a_model_whose_tokens_see_later_ones_is_refused(captured, name):
    with pytest.raises(IncrementalError):
        incremental(captured(name))


def test_the_graph_itself_stays_as_it_is(captured):
    graph = captured("llama")
    before = str(graph)
    incremental(graph)
    assert str(graph) == before
