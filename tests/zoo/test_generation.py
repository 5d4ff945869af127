"""Every family that generates: the same tokens as transformers gives, on both backends."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamella
from lamella.generation import GenerativeExecutable
from tests.conftest import family_of
from tests.zoo.shorter import without_layers, without_sublayer

DECODERS = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "opt", "mixtral"),
    *("qwen3_moe", "mamba", "mamba2"),
)
SEQ2SEQ = ("t5", "bart", "whisper")
RECURRENT = ("mamba", "mamba2")
BACKENDS = ("eager", "onnxruntime")
NEW = 64


@functools.cache
def language_model(name: str) -> nn.Module:
    """A tiny model with room for the prompt and the new tokens, that never stops by itself."""
    model: Any = family_of(name).build()
    model.config.use_cache = True
    model.generation_config.update(
        use_cache=True, eos_token_id=None, pad_token_id=0, decoder_start_token_id=2
    )
    return model


@functools.cache
def graph_of(name: str) -> lamella.Graph:
    return lamella.capture(language_model(name), family_of(name).inputs())


@functools.cache
def compiled(name: str, backend: str) -> GenerativeExecutable:
    executable = lamella.lower(graph_of(name), backend)
    assert isinstance(executable, GenerativeExecutable)
    return executable


def prompts(name: str, batch: int, length: int, padded: bool) -> dict[str, Tensor]:
    """Prompts; with `padded` each row but the first has one more token of padding on the left."""
    given = family_of(name).inputs(batch, length, 3)
    given = {k: v for k, v in given.items() if not k.startswith("decoder_")}
    if "input_ids" not in given:
        return given
    mask = torch.ones_like(given["input_ids"])
    for row in range(batch if padded else 0):
        mask[row, :row] = 0
    ids = given["input_ids"].masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    asked = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**copy.deepcopy(given), **{**asked, "output_logits": True, **options})


def assert_same(got: Any, wanted: Any) -> None:
    """The same tokens, and logits that differ by rounding: they are added up in another order."""
    assert torch.equal(got.sequences, wanted.sequences)
    for ours, theirs in zip(got.logits, wanted.logits, strict=True):
        assert float((ours - theirs).abs().max()) <= 2e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_greedy_tokens_are_those_of_transformers(name, backend):
    model, executable = language_model(name), compiled(name, backend)
    cases = [prompts(name, 1, length, padded=False) for length in (4, 7, 11)]
    cases.append(prompts(name, 4, 9, padded=name not in RECURRENT))
    assert_generates_alike(name, executable, model, cases)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_a_model_without_a_block_generates_what_transformers_does_without_its_layer(name, backend):
    # The first block of a decoder, from whose cache transformers reads the past length; in the
    # middle of both stacks where there are two: the first of T5 holds what all of them use.
    layers = (1, 1) if name in SEQ2SEQ else (0,)
    edit = "drop-blocks blocks=1,4" if name in SEQ2SEQ else "drop-blocks blocks=0"
    executable = shortened(name, edit, backend)
    cases = [prompts(name, 1, 7, padded=False), prompts(name, 4, 9, padded=name not in RECURRENT)]
    assert_generates_alike(name, executable, without_layers(language_model(name), layers), cases)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "sublayer", "module"),
    [
        ("llama", 0, "model.layers.0.self_attn"),
        ("llama", 3, "model.layers.1.mlp"),
        ("gpt2", 2, "transformer.h.1.attn"),
        ("gpt2", 5, "transformer.h.2.mlp"),
    ],
)
def test_a_model_without_a_sublayer_generates_what_transformers_does(
    name, sublayer, module, backend
):
    executable = shortened(name, f"drop-sublayers sublayers={sublayer}", backend)
    assert len(executable.layout.slots) == (6 if module.endswith("mlp") else 4)
    model = without_sublayer(language_model(name), module)
    cases = [prompts(name, 1, 7, padded=False), prompts(name, 4, 9, padded=True)]
    assert_generates_alike(name, executable, model, cases, use_cache=False)


@functools.cache
def edited(name: str, edit: str) -> lamella.Graph:
    graph = graph_of(name).copy()
    lamella.transform(graph, [edit])
    return graph


def shortened(name: str, edit: str, backend: str) -> GenerativeExecutable:
    executable = lamella.lower(edited(name, edit), backend)
    assert isinstance(executable, GenerativeExecutable)
    return executable


def assert_generates_alike(
    name: str,
    executable: GenerativeExecutable,
    model: nn.Module,
    cases: list[dict[str, Tensor]],
    **options: Any,
) -> None:
    """The same tokens and logits as `model`; `options` are for `model` alone."""
    for given in cases:
        if name == "whisper":
            # Its own generate looks into the tensors of the cache to give logits as well.
            plain = {"output_logits": False, "return_dict_in_generate": False}
            assert torch.equal(greedy(executable, given, **plain), greedy(model, given, **plain))
        else:
            assert_same(greedy(executable, given), greedy(model, given, **options))
