"""Decoders: what is checked before anything runs, and the one over tensors that grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.backends.decoder import GrowingDecoder, GrowingState
from lamella.backends.inputs import InputSpec
from lamella.errors import BackendError, GenerationError
from lamella.ir.cache import CacheLayout, Slot

SLOTS = (
    Slot(0, "key", "past.k", "present.k", (1, -1, 1), "float32"),
    Slot(0, "value", "past.v", "present.v", (1, -1, 1), "float32"),
)
STATE = Slot(1, "scan", "past.s", "present.s", (1, 1), "float32")


def layout(**changes: Any) -> CacheLayout:
    fields: dict[str, Any] = {
        "tokens": "ids",
        "mask": "mask",
        "positions": "positions",
        "positions_from": "index",
        "logits": "logits",
        "once": (),
        "slots": SLOTS,
    }
    return CacheLayout(**(fields | changes))


class Recorder:
    """A model whose keys are its tokens; it keeps what it was called with.

    The logits of a token are its sum with all tokens before it that are not hidden.
    """

    def __init__(self, **changes: Any) -> None:
        self.layout = layout(**changes)
        self.calls: list[dict[str, Tensor]] = []

    def decoder(self) -> GrowingDecoder:
        names = ["ids", "mask", *(["positions"] if self.layout.positions else [])]
        specs = [InputSpec(name, "int64", ("batch", "n")) for name in names]
        specs += [InputSpec(name, "float32", ("batch", 1)) for name in self.layout.once]
        shape = ("batch", 1, "past", 1)
        specs += [InputSpec(slot.input, "float32", shape) for slot in self.layout.slots]
        outputs = ["logits", *(slot.output for slot in self.layout.slots)]
        self.names = [spec.name for spec in specs]
        return GrowingDecoder(self.run, self.layout, specs, outputs)

    def run(self, values: Sequence[Any]) -> list[Tensor]:
        given = dict(zip(self.names, values, strict=True))
        self.calls.append(given)
        ids = given["ids"].float()
        keys = torch.cat((given["past.k"], ids[:, None, :, None]), dim=2)
        past = keys.shape[2] - ids.shape[1]
        sums = (keys[:, 0, :, 0] * given["mask"]).cumsum(1)[:, past:]
        present = [keys if slot.grows else given[slot.input] + 1 for slot in self.layout.slots]
        return [sums[..., None], *present]


def ids(*rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def test_the_past_of_a_call_is_the_present_of_the_last():
    model = Recorder()
    decoder = model.decoder()
    state = decoder.start(1)
    assert decoder.step(state, ids([1, 2])).flatten().tolist() == [1.0, 3.0]
    assert decoder.step(state, ids([4])).flatten().tolist() == [7.0]
    assert state.length == 3
    assert model.calls[1]["positions"].tolist() == [[2]]
    assert model.calls[1]["mask"].tolist() == [[1, 1, 1]]


def test_only_the_last_logits():
    decoder = Recorder().decoder()
    assert decoder.step(decoder.start(1), ids([1, 2, 3]), last_only=True).tolist() == [[[6.0]]]


def test_positions_are_counted_as_the_model_does():
    mask = ids([0, 1, 1], [1, 1, 1])
    by_index, by_mask = Recorder(), Recorder(positions_from="mask")
    for model, expected in ((by_index, [0, 1, 2]), (by_mask, [-1, 0, 1])):
        decoder = model.decoder()
        decoder.step(decoder.start(2), ids([5, 1, 1], [1, 1, 1]), mask)
        assert model.calls[0]["positions"][0].tolist() == expected
        assert model.calls[0]["positions"][1].tolist() == [0, 1, 2]


def test_given_positions_are_taken():
    model = Recorder()
    decoder = model.decoder()
    decoder.step(decoder.start(1), ids([1, 2]), positions=ids([7, 9]))
    assert model.calls[0]["positions"].tolist() == [[7, 9]]


def test_sequences_are_reordered_repeated_and_cropped():
    decoder = Recorder().decoder()
    state = decoder.start(2)
    decoder.step(state, ids([1, 2], [10, 20]))
    state.reorder(torch.tensor([1, 0]))
    assert decoder.step(state, ids([0], [0])).flatten().tolist() == [30.0, 3.0]
    state.crop(1)
    assert decoder.step(state, ids([0], [0])).flatten().tolist() == [10.0, 1.0]
    state.repeat(2)
    assert state.batch == 4
    got = decoder.step(state, ids([0], [1], [0], [1])).flatten().tolist()
    assert got == [10.0, 11.0, 1.0, 2.0]


def test_inputs_that_stay_follow_their_sequences():
    model = Recorder(once=("side",))
    decoder = model.decoder()
    state = decoder.start(2, once={"side": torch.tensor([[1.0], [2.0]])})
    state.repeat(2)
    decoder.step(state, ids([1], [1], [1], [1]))
    assert model.calls[0]["side"].flatten().tolist() == [1.0, 1.0, 2.0, 2.0]


def test_a_recurrence_starts_again_or_not_at_all():
    decoder = Recorder(slots=(*SLOTS, STATE)).decoder()
    state = decoder.start(1)
    decoder.step(state, ids([1, 2]))
    assert isinstance(state, GrowingState)
    with pytest.raises(GenerationError, match=r"can't go back from 2 tokens to 1: past\.s holds"):
        state.crop(1)
    state.crop(2)
    state.crop(0)
    assert state.length == 0
    assert state.cache[2].tolist() == [[[0.0]]]


@pytest.mark.parametrize("length", [-1, 3])
def test_a_crop_keeps_what_there_is(length: int):
    decoder = Recorder().decoder()
    state = decoder.start(1)
    decoder.step(state, ids([1, 2]))
    with pytest.raises(GenerationError, match=f"can't keep {length} tokens of a sequence"):
        state.crop(length)


def test_sizes_that_disagree_are_refused():
    decoder = Recorder().decoder()
    state = decoder.start(2)
    for tokens in (ids([1]), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(GenerationError, match=r"new tokens have shape .*, expected \[2, at"):
            decoder.step(state, tokens)
    decoder.step(state, ids([1], [1]))
    with pytest.raises(GenerationError, match=r"mask has shape \[2, 1\], expected \[2, 2\]: 1 tok"):
        decoder.step(state, ids([1], [1]), torch.ones(2, 1))
    with pytest.raises(GenerationError, match=r"positions have shape \[1, 1\]"):
        decoder.step(state, ids([1], [1]), positions=ids([0]))
    with pytest.raises(GenerationError, match="at least one sequence"):
        decoder.start(0)
    with pytest.raises(ValueError, match="times must be at least 1"):
        state.repeat(0)


def test_a_table_of_positions_ends():
    decoder = Recorder(positions_limit=3).decoder()
    with pytest.raises(GenerationError, match=r"4 tokens is longer than .* positions for \(3\)"):
        decoder.start(1, 4)
    state = decoder.start(1)
    decoder.step(state, ids([1, 2, 3]))
    with pytest.raises(GenerationError, match="shorten the prompt"):
        decoder.step(state, ids([1]))
    assert state.length == 3


def test_inputs_of_a_sequence_are_named():
    decoder = Recorder(once=("side",)).decoder()
    with pytest.raises(
        GenerationError, match="takes the inputs side once for a sequence, got none"
    ):
        decoder.start(1)
    with pytest.raises(GenerationError, match=r"takes the inputs none once .* got side"):
        Recorder().decoder().start(1, once={"side": torch.zeros(1)})


def test_an_input_that_nothing_fills_is_refused():
    specs = [InputSpec(name, "int64", ()) for name in ("ids", "mask", "positions", "types")]
    with pytest.raises(BackendError, match="the graph takes types, which generation has nothing"):
        GrowingDecoder(lambda values: [], layout(slots=()), specs, ["logits"])
