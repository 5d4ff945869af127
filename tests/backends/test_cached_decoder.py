"""Decoders of ONNX Runtime over models of the zoo, against those of PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from lamella.backends.artifact import open_artifact
from lamella.backends.decoder import Decoder, GrowingDecoder
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.buffers import Buffers
from lamella.backends.onnxruntime.decoder import OnnxDecoder
from lamella.backends.onnxruntime.files import DATA, DECODER, MODEL
from lamella.backends.torch.eager import EagerBackend
from lamella.errors import GenerationError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.rewrite.canonicalize import canonicalize
from lamella.rewrite.incremental import incremental

Captured = Callable[[str], Graph]

WIDE = "qwen2, heads of 16"
"""Its heads are wide enough for the kernel to rotate them; those of the zoo are not."""

BUFFERED = (WIDE, "gemma3", "gpt2")


def assert_near(got: Tensor, want: Tensor) -> None:
    """Rounding of float32 through two or three layers, relative to the largest logit."""
    bound = 5e-6 * float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=0.0, atol=max(bound, 1e-6))


def wide() -> Graph:
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).eval()
    ones = torch.ones(2, 7, dtype=torch.int64)
    graph = capture_module(model, {"input_ids": ones.clone(), "attention_mask": ones})
    canonicalize(graph)
    return graph


@functools.cache
def _steps(captured: Captured, name: str) -> Graph:
    return incremental(wide() if name == WIDE else captured(name)).step


@functools.cache
def pair(captured: Captured, name: str) -> tuple[Decoder, Decoder]:
    """Of ONNX Runtime, and of PyTorch."""
    step = _steps(captured, name)
    return OnnxRuntimeBackend(threads=1).decoder(step), EagerBackend().decoder(step)


def tokens_of(batch: int, count: int) -> Tensor:
    return torch.randint(3, 60, (batch, count), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", BUFFERED)
def test_prompt_tokens_and_several_at_once(captured: Captured, name: str):
    ours, theirs = pair(captured, name)
    assert isinstance(ours, OnnxDecoder)
    for batch in (1, 2):
        one, two = ours.start(batch, 8), theirs.start(batch)
        for given in tokens_of(batch, 14).split((6, 1, 1, 4, 2), dim=1):
            assert_near(ours.step(one, given), theirs.step(two, given))
        assert isinstance(one, Buffers)
        assert one.general is None


@pytest.mark.parametrize("name", BUFFERED)
def test_a_batch_padded_on_the_left(captured: Captured, name: str):
    ours, theirs = pair(captured, name)
    tokens, mask = tokens_of(3, 13), torch.ones(3, 13, dtype=torch.int64)
    mask[0, :4], mask[1, :1] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    one, two, done = ours.start(3), theirs.start(3), 0
    for new in (7, 1, 1, 3, 1):
        end = done + new
        given = (tokens[:, done:end], mask[:, :end], positions[:, done:end])
        read = mask[:, done:end].bool()
        assert_near(ours.step(one, *given)[read], theirs.step(two, *given)[read])
        done = end
    assert isinstance(one, Buffers)
    assert one.general is None


@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_what_has_no_buffers_decodes_as_well(captured: Captured, name: str):
    parts = incremental(captured(name))
    ours, theirs = (
        backend.decoder(parts.step) for backend in (OnnxRuntimeBackend(threads=1), EagerBackend())
    )
    once: dict[str, Tensor] = {}
    if parts.once is not None:
        shape = (2, 9)
        given = {"input_ids": tokens_of(*shape), "attention_mask": torch.ones(shape).long()}
        results = parts.once(**{name: given[name] for name in parts.once.signature.inputs})
        once = {name: results[name] for name in ours.layout.once}
    one, two = ours.start(2, once=once), theirs.start(2, once=once)
    for given in tokens_of(2, 8).split((5, 1, 2), dim=1):
        assert_near(ours.step(one, given), theirs.step(two, given))


def test_beams(captured: Captured):
    ours, theirs = pair(captured, WIDE)
    one, two = ours.start(2), theirs.start(2)
    prompt = tokens_of(2, 5)
    for decoder, state in ((ours, one), (theirs, two)):
        decoder.step(state, prompt)
        state.repeat(2)
    for order in ([1, 0, 3, 2], [0, 0, 2, 2], [3, 2, 1, 0], [0, 1, 2, 3]):
        for state in (one, two):
            state.reorder(torch.tensor(order))
        given = tokens_of(4, 1)
        assert_near(ours.step(one, given), theirs.step(two, given))
    for state in (one, two):
        state.reorder(torch.tensor([2]))
    assert_near(ours.step(one, given[:1]), theirs.step(two, given[:1]))


def test_tokens_that_were_refused_are_taken_back(captured: Captured):
    """As when several tokens are verified at once; padding stays where it was."""
    ours, theirs = pair(captured, WIDE)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    one, two = ours.start(2), theirs.start(2)
    tokens = tokens_of(2, 9)
    for decoder, state in ((ours, one), (theirs, two)):
        decoder.step(state, tokens[:, :8], mask[:, :8], positions[:, :8])
        state.crop(5)
        assert state.length == 5
    given = (tokens[:, 5:9], mask, positions[:, 5:9])
    assert_near(ours.step(one, *given), theirs.step(two, *given))


@pytest.mark.parametrize("name", [WIDE, "gpt2"])
def test_positions_that_are_shifted(captured: Captured, name: str):
    """Angles depend on differences; a table of positions is read where it is told to."""
    ours, theirs = pair(captured, name)
    one, two = ours.start(1), theirs.start(1)
    tokens = tokens_of(1, 6)
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        positions = torch.arange(start, stop)[None] + 3
        given = (tokens[:, start:stop], None, positions)
        assert_near(ours.step(one, *given), theirs.step(two, *given))
    assert isinstance(one, Buffers)
    assert one.general is None


def test_positions_that_jump_go_the_general_way(captured: Captured):
    ours, theirs = pair(captured, WIDE)
    one, two = ours.start(2), theirs.start(2)
    tokens = tokens_of(2, 8)
    for start, positions in ((0, [0, 1, 2]), (3, [3]), (4, [9, 11]), (6, [12])):
        stop = start + len(positions)
        given = (tokens[:, start:stop], None, torch.tensor(positions).expand(2, -1))
        assert_near(ours.step(one, *given), theirs.step(two, *given))
    assert isinstance(one, Buffers)
    assert one.general is not None
    for state in (one, two):
        state.crop(6)
        state.reorder(torch.tensor([1, 0]))
        assert state.length == 6
    assert_near(ours.step(one, tokens[:, :2]), theirs.step(two, tokens[:, :2]))


def test_a_mask_that_changes_its_mind(captured: Captured):
    ours, theirs = pair(captured, WIDE)
    one, two = ours.start(1), theirs.start(1)
    tokens = tokens_of(1, 5)
    for decoder, state in ((ours, one), (theirs, two)):
        decoder.step(state, tokens[:, :4])
    hidden = torch.tensor([[1, 0, 1, 1, 1]])
    given = (tokens[:, 4:], hidden, torch.tensor([[4]]))
    assert_near(ours.step(one, *given), theirs.step(two, *given))
    padded = ours.start(1)
    ours.step(padded, tokens[:, :4], torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(GenerationError, match="the mask hides other tokens of the past"):
        ours.step(padded, tokens[:, 4:], torch.ones(1, 5))


def test_a_sequence_longer_than_the_tables_goes_on(captured: Captured, monkeypatch):
    """Rotated by angles that the graph computes, as the model itself would."""
    step = _steps(captured, WIDE).copy()
    short = {"max_position_embeddings": 6}
    monkeypatch.setattr(step, "origin", replace(step.origin, config=short))
    ours, theirs = OnnxRuntimeBackend(threads=1).decoder(step), EagerBackend().decoder(step)
    one, two = ours.start(1, 64), theirs.start(1)
    for given in tokens_of(1, 9).split((4, 1, 3, 1), dim=1):
        assert_near(ours.step(one, given), theirs.step(two, given))


def test_one_token_allocates_nothing(captured: Captured):
    ours, _ = pair(captured, WIDE)
    state = ours.start(1, 32)
    assert isinstance(state, Buffers)
    ours.step(state, tokens_of(1, 4))
    first = ours.step(state, tokens_of(1, 1))
    places = [tensor.data_ptr() for tensor in (*state.past, *state.present)]
    second = ours.step(state, tokens_of(1, 1))
    assert second.data_ptr() == first.data_ptr()
    assert [tensor.data_ptr() for tensor in (*state.past, *state.present)] == places


def test_capacity_is_what_was_asked_for(captured: Captured):
    ours, _ = pair(captured, WIDE)
    state = ours.start(1, 100)
    assert isinstance(state, Buffers)
    assert state.capacity == 128
    ours.step(state, tokens_of(1, 20))
    assert state.capacity == 128


def test_angles_are_tables_where_they_follow_from_positions(captured: Captured):
    for name in BUFFERED:
        ours, _ = pair(captured, name)
        assert isinstance(ours, OnnxDecoder)
        assert (ours.tables is not None) == (name == WIDE), name


def test_a_saved_decoder(captured: Captured, tmp_path: Path):
    step = _steps(captured, WIDE)
    backend = OnnxRuntimeBackend(threads=1)
    assert step.cache is not None
    backend.lower(step).save(tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {MODEL, DECODER} <= files
    loaded = backend.load(open_artifact(tmp_path / "out"))
    ours, theirs = loaded.decoder(step.cache), EagerBackend().decoder(step)
    assert isinstance(ours, OnnxDecoder)
    one, two = ours.start(1), theirs.start(1)
    for given in tokens_of(1, 5).split((3, 1, 1), dim=1):
        assert_near(ours.step(one, given), theirs.step(two, given))


def test_both_forms_read_one_file_of_weights(captured: Captured, tmp_path: Path):
    step = _steps(captured, WIDE)
    backend = OnnxRuntimeBackend(threads=1)
    executable = backend.lower(step)
    executable.save(tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert sizes[DATA] > executable.weight_bytes * 0.8
    assert sizes[MODEL] < executable.weight_bytes * 0.5
    assert step.cache is not None
    general = GrowingDecoder(
        executable.run, step.cache, executable.inputs, executable.signature.outputs
    )
    ours = executable.decoder(step.cache)
    given = tokens_of(1, 4)
    assert_near(ours.step(ours.start(1), given), general.step(general.start(1), given))
