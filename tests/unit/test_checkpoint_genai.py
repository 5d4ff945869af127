"""Folders of onnxruntime-genai, run by onnxruntime-genai."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai
import pytest
import torch
import transformers

import lamella
from lamella.errors import CheckpointError
from tests.conftest import family_of
from tests.tiny import save_language_model

DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "opt", "mixtral")
PROMPT = torch.tensor([[5, 17, 40, 8, 23, 61]])
NEW = 24


def model_of(name: str) -> Any:
    model: Any = family_of(name).build()
    model.config.use_cache = True
    model.generation_config.update(eos_token_id=2, pad_token_id=0, use_cache=True)
    return model


def generated(folder: Path) -> list[int]:
    """Greedy tokens, with the prompt, as the runner makes them."""
    model = onnxruntime_genai.Model(str(folder))
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=PROMPT.shape[1] + NEW, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(PROMPT[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@pytest.mark.parametrize("name", DECODERS)
def test_the_runner_generates_what_transformers_generates(name, tmp_path):
    model = model_of(name)
    lamella.save_checkpoint(lamella.capture(model), tmp_path / "out", format="onnxruntime-genai")
    wanted = model.generate(input_ids=PROMPT, max_new_tokens=NEW, do_sample=False)[0].tolist()
    got = generated(tmp_path / "out")
    # Only one of the two repeats the token that ends the text.
    assert got == wanted[: len(got)]
    assert len(wanted) - len(got) <= 1


def test_logits_are_those_of_the_last_token_that_is_there(tmp_path):
    model, prompts, new = model_of("llama"), ([5, 17, 40, 8, 23, 61], [9, 12, 44]), 8
    lamella.save_checkpoint(lamella.capture(model), tmp_path / "out", format="onnxruntime-genai")
    written = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    (logits,) = [value for value in written.graph.output if value.name == "logits"]
    assert [dim.dim_value for dim in logits.type.tensor_type.shape.dim][1] == 1
    runner = onnxruntime_genai.Model(str(tmp_path / "out"))
    options = onnxruntime_genai.GeneratorParams(runner)
    options.set_search_options(max_length=6 + new, batch_size=2, do_sample=False)
    generator = onnxruntime_genai.Generator(runner, options)
    # The runner fills prompts up on the right.
    generator.append_tokens(np.array([[*p, *[0] * (6 - len(p))] for p in prompts], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    for index, prompt in enumerate(prompts):
        given = torch.tensor([prompt])
        wanted = model.generate(input_ids=given, max_new_tokens=new, do_sample=False)[0].tolist()
        got = [int(token) for token in generator.get_sequence(index)]
        assert got[6:] == wanted[len(prompt) :]


def test_a_second_turn_continues_as_one_prompt_with_all_of_it(tmp_path):
    lamella.save_checkpoint(
        lamella.capture(model_of("llama")), tmp_path / "out", format="onnxruntime-genai"
    )
    runner = onnxruntime_genai.Model(str(tmp_path / "out"))

    def begun(prompt: list[int]) -> Any:
        generator = onnxruntime_genai.Generator(runner, onnxruntime_genai.GeneratorParams(runner))
        generator.append_tokens(prompt)
        return generator

    generator = begun(PROMPT[0].tolist())
    for _ in range(4):
        generator.generate_next_token()
    answer = [int(token) for token in generator.get_sequence(0)]
    # As docs/deploy-checkpoints.md says: the runner itself leaves out the last token.
    generator.rewind_to(len(answer) - 1)
    generator.append_tokens([answer[-1], 9, 12])
    wanted = begun([*answer, 9, 12]).get_logits()
    # Sums of float32 in another order.
    np.testing.assert_allclose(generator.get_logits(), wanted, rtol=1e-4, atol=1e-5)


def _inputs(folder: Path) -> set[str]:
    written = onnx.load(folder / "model.onnx", load_external_data=False)
    config = json.loads((folder / "genai_config.json").read_text())
    found = {value.name for value in written.graph.input if "past" not in value.name}
    assert found == {key for key in config["model"]["decoder"]["inputs"] if "past" not in key}
    return found


def test_positions_are_an_input_where_something_reads_them(tmp_path):
    # Heads of 32: the attention rotates them itself, by the row that a token has in the cache.
    folder = save_language_model(tmp_path / "model")
    rotary = transformers.AutoModelForCausalLM.from_pretrained(folder)
    models = {"rotary": rotary, "table": model_of("gpt2")}
    for name, model in models.items():
        graph = lamella.capture(model)
        lamella.save_checkpoint(graph, tmp_path / name, format="onnxruntime-genai")
    assert _inputs(tmp_path / "rotary") == {"input_ids", "attention_mask"}
    assert _inputs(tmp_path / "table") == {"input_ids", "attention_mask", "position_ids"}
    wanted = rotary.generate(input_ids=PROMPT, max_new_tokens=NEW, do_sample=False)
    got = generated(tmp_path / "rotary")
    assert got == wanted[0].tolist()[: len(got)]


def test_blocks_that_were_dropped_are_gone_from_the_config(tmp_path):
    graph = lamella.capture(model_of("llama"))
    lamella.transform(graph, ["drop-blocks blocks=1", "quantize-weights bits=8 block=32"])
    lamella.save_checkpoint(graph, tmp_path / "out", format="onnxruntime-genai")
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 2
    compiled = lamella.lower(graph, "onnxruntime")
    wanted = compiled.generate(input_ids=PROMPT, max_new_tokens=NEW, do_sample=False)[0].tolist()
    got = generated(tmp_path / "out")
    assert got == wanted[: len(got)]


@pytest.mark.parametrize(("name", "why"), [("t5", "an encoder"), ("mamba", "convolution, scan")])
def test_models_that_the_runner_can_not_drive_are_refused(name, why, tmp_path):
    with pytest.raises(CheckpointError, match=why):
        lamella.save_checkpoint(
            lamella.capture(model_of(name)), tmp_path / "out", format="onnxruntime-genai"
        )
    assert not (tmp_path / "out").exists()
