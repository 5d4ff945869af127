"""Edited models as folders of Hugging Face, loaded by transformers: the same outputs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from lamella.checkpoints.save import save_checkpoint
from lamella.ir.graph import Graph
from lamella.ir.huggingface import capture_pretrained
from lamella.ir.torch_private import tree_leaves
from lamella.passes.base import Analyses, Transform
from lamella.passes.transforms.blend_weights import BlendWeights
from lamella.passes.transforms.drop_blocks import DropBlocks
from lamella.passes.transforms.fold_norms import FoldNorms
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from lamella.passes.transforms.restore_blocks import RestoreBlocks
from lamella.rewrite.canonicalize import canonicalize
from tests.conftest import family_of

NAMES = "llama qwen2 qwen3 mistral gemma2 gemma3 gpt2 opt mixtral bert vit t5".split()


@functools.cache
def _captured(name: str) -> Graph:
    graph = capture_pretrained(family_of(name).build(), family_of(name).inputs())
    canonicalize(graph)
    return graph


def edited(name: str, *passes: Transform) -> Graph:
    graph = _captured(name).copy()
    for one in passes:
        one.run(graph, Analyses(graph))
        graph.finish()
    return graph


def assert_loads(graph: Graph, name: str, folder: Path, **options: Any) -> Any:
    """The model in `folder` has the outputs of `graph`; nothing is missing and nothing too many."""
    transformers.utils.logging.disable_progress_bar()
    save_checkpoint(graph, folder, **options)
    loader = getattr(transformers, graph.origin.architecture)
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for batch, sequence in family_of(name).sizes()[:2]:
        inputs = family_of(name).inputs(batch, sequence, seed=5)
        with torch.no_grad():
            have = tree_leaves(model.eval()(**inputs, return_dict=True).to_tuple())
        for one, two in zip(have, tree_leaves(graph(**inputs)), strict=True):
            if isinstance(two, Tensor) and two.is_floating_point():
                # The same operations on the same weights; a few are written another way.
                torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * float(two.abs().max()))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_an_edited_model_loads_and_computes_the_same(name, tmp_path):
    other = _captured(name).copy()
    for node in other.weight_nodes():
        if node.meta["val"].is_floating_point() and str(node.target) not in other.origin.constants:
            other.set_weight(node, other.weight(node) * 0.5)
    graph = edited(
        name,
        BlendWeights(other, ratio=0.5),
        RestoreBlocks(other, blocks=(2,)),
        DropBlocks(blocks=(0,)),
        FoldNorms(),
        QuantizeWeights(bits=8, scales="float32", int8_activations=False),
    )
    model = assert_loads(graph, name, tmp_path / "out", max_shard_size="60KB")
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count < sum(p.numel() for p in family_of(name).build().parameters())


def test_lists_of_the_config_lose_the_entries_of_dropped_layers(tmp_path):
    graph = edited("gemma2", DropBlocks(blocks=(1,)))
    before = graph.origin.config
    model = assert_loads(graph, "gemma2", tmp_path / "out")
    assert model.config.num_hidden_layers == 2
    assert before["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert model.config.layer_types == ["sliding_attention", "sliding_attention"]


def test_both_stacks_of_an_encoder_decoder_are_counted(tmp_path):
    graph = edited("t5", DropBlocks(blocks=(0, 4, 5)))
    save_checkpoint(graph, tmp_path / "out")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 1)


def test_tied_weights_stay_tied(tmp_path):
    model = assert_loads(edited("gemma3"), "gemma3", tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in _stored(tmp_path / "out")


def test_experts_are_stored_one_by_one(tmp_path):
    assert_loads(edited("mixtral"), "mixtral", tmp_path / "out")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in _stored(tmp_path / "out")


def _stored(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())
