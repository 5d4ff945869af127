"""What a compiled language model refuses, and how it says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lamella
from lamella.backends.manifest import read_manifest, write_manifest
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.session import CPU
from lamella.errors import ArtifactError, GenerationError, ProviderError
from lamella.generation import GenerativeExecutable

POSITIONS = 16
BACKENDS = ("eager", "onnxruntime")


@pytest.fixture(scope="module")
def graph() -> lamella.Graph:
    """A GPT-2 with few positions, that never stops by itself."""
    config = transformers.GPT2Config(
        vocab_size=99,
        n_embd=32,
        n_layer=1,
        n_head=4,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0, use_cache=True)
    return lamella.capture(model, prompts(2, 7))


@pytest.fixture(scope="module", params=BACKENDS)
def executable(request: Any, graph: lamella.Graph) -> GenerativeExecutable:
    made = lamella.lower(graph, request.param)
    assert isinstance(made, GenerativeExecutable)
    return made


@pytest.fixture
def saved(executable: GenerativeExecutable, tmp_path: Path) -> Path:
    executable.save(tmp_path / "out")
    return tmp_path / "out"


def prompts(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.arange(3, 3 + batch * length).reshape(batch, length) % 90 + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest that says something else, and whose own digest is right."""
    manifest = read_manifest(folder / "manifest.json")
    change(manifest)
    write_manifest(folder / "manifest.json", manifest)


# ---- sequences ------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_positions_is_refused(executable):
    assert executable.layout.positions_limit == POSITIONS
    wanted = r"20 tokens is longer than the model has positions for \(16\); shorten the prompt"
    with pytest.raises(GenerationError, match=wanted):
        executable.generate(**prompts(1, 20), max_new_tokens=4)
    with pytest.raises(GenerationError, match=wanted):
        executable(**prompts(2, 20))


def test_a_text_may_fill_the_positions_and_not_more(executable):
    given = prompts(2, 7)
    assert executable.generate(**given, max_length=POSITIONS).shape == (2, POSITIONS)
    # The last token is given out, not read.
    assert executable.generate(**given, max_length=POSITIONS + 1).shape == (2, POSITIONS + 1)
    with pytest.raises(GenerationError, match="generate fewer tokens"):
        executable.generate(**given, max_length=POSITIONS + 2)


def test_a_text_that_ends_in_time_may_ask_for_more(executable):
    given = prompts(1, 7)
    first = int(executable.generate(**given, max_new_tokens=1)[0, -1])
    done = executable.generate(**given, max_new_tokens=500, eos_token_id=first)
    assert done.shape == (1, 8)


@pytest.mark.parametrize("shape", [(2, 5), (2, 9), (1, 7), (3, 7)])
def test_a_mask_of_another_shape_is_refused(executable, shape):
    given = {**prompts(2, 7), "attention_mask": torch.ones(shape, dtype=torch.int64)}
    wanted = rf"mask has shape \[{shape[0]}, {shape[1]}\], expected \[2, 7\]"
    with pytest.raises(GenerationError, match=wanted):
        executable.generate(**given, max_new_tokens=3)
    with pytest.raises(GenerationError, match=wanted):
        executable(**given, use_cache=True)


# ---- folders --------------------------------------------------------------------------------


def _generation(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["details"]["generation"]


def _slot(manifest: dict[str, Any]) -> dict[str, Any]:
    return _generation(manifest)["layout"]["slots"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: _slot(manifest).update(shape=[4, -1, 9]),
        lambda manifest: _slot(manifest).update(shape=[4, 8]),
        lambda manifest: _slot(manifest).update(dtype="float16"),
        lambda manifest: _slot(manifest).update(input="past"),
        lambda manifest: _slot(manifest).update(output="present"),
        lambda manifest: _generation(manifest)["layout"].update(logits="scores"),
        lambda manifest: _generation(manifest).update(parts={}),
        lambda manifest: _generation(manifest).update(parts=3),
        lambda manifest: _generation(manifest).update(architecture=None),
        lambda manifest: _generation(manifest).update(generation_config=None),
        lambda manifest: manifest.update(signature={}),
        lambda manifest: manifest["signature"].update(in_spec=["zz", {}]),
        lambda manifest: manifest["signature"]["in_spec"][1].update(type="zz"),
        lambda manifest: _generation(manifest)["config"].update(vocab_size="zz"),
        lambda manifest: manifest.update(details=None),
        lambda manifest: manifest.update(inputs=[{"name": "input_ids"}]),
    ],
)
def test_a_manifest_that_lies_about_the_model_is_refused(saved, change):
    edit(saved, change)
    with pytest.raises(ArtifactError, match=r"save (it|the executable) again|malformed"):
        lamella.load(saved)


def test_an_error_at_loading_says_which_versions_were_others(saved):
    def change(manifest: dict[str, Any]) -> None:
        manifest["versions"]["torch"] = "9.9"
        _slot(manifest).update(dtype="float16")

    edit(saved, change)
    with pytest.raises(ArtifactError) as caught:
        lamella.load(saved)
    assert any("was saved with torch 9.9 (here 2" in note for note in caught.value.__notes__)


def test_a_model_for_another_provider_does_not_fall_back_to_the_cpu(graph, tmp_path):
    lamella.lower(graph, "onnxruntime").save(tmp_path / "out")
    missing = "CUDAExecutionProvider"

    def change(manifest: dict[str, Any]) -> None:
        part = _generation(manifest)["parts"]["step"]["details"]
        assert part["provider"] == CPU
        part["provider"] = missing

    edit(tmp_path / "out", change)
    with pytest.raises(ProviderError, match=rf"has no provider '{missing}', it has .*{CPU}"):
        lamella.load(tmp_path / "out")


def test_a_model_is_not_loaded_for_another_provider_than_it_was_made_for(tmp_path):
    graph = lamella.capture(torch.nn.Linear(3, 3), (torch.zeros(2, 3),))
    lamella.lower(graph, "onnxruntime").save(tmp_path / "out")
    backend = OnnxRuntimeBackend(provider="CUDAExecutionProvider")
    with pytest.raises(ArtifactError, match=f"saved for {CPU}, not for CUDA.*compile it again"):
        backend.load(lamella.verify(tmp_path / "out"))
