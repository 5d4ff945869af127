"""Samples: digests, batching of texts, what is refused."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.data import Batching, Samples
from lamella.errors import SamplesError


class Words:
    """A tokenizer with one id per word, as transformers would call it."""

    pad_token_id = None

    def __call__(
        self, texts: list[str], truncation: bool = False, max_length: int | None = None
    ) -> dict[str, Any]:
        cut = slice(0, max_length if truncation else None)
        ids = [[len(word) for word in text.split()][cut] for text in texts]
        return {"input_ids": ids, "token_type_ids": [[0] * len(row) for row in ids]}


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_dicts_are_batches():
    samples = Samples.of([{"x": ids([1, 2])}, {"x": np.array([[3, 4, 5]])}])
    assert len(samples) == 2
    assert torch.equal(samples[1]["x"], ids([3, 4, 5]))
    assert [set(batch) for batch in samples] == [{"x"}, {"x"}]


def test_a_generator_is_consumed_up_to_the_limit():
    made: list[int] = []

    def endless():
        while True:
            made.append(len(made))
            yield {"x": ids([len(made)])}

    assert len(Samples.of(endless(), limit=3)) == 3
    assert made == [0, 1, 2]


def test_texts_become_padded_batches_with_a_mask():
    texts = ["a bb ccc", "a", "dddd a a a a a"]
    samples = Samples.of(texts, tokenizer=Words(), batching=Batching(2, 4), seed=5)
    first, second = samples.batches
    assert first["input_ids"].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert first["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert second["input_ids"].tolist() == [[4, 1, 1, 1]]
    assert (samples.truncated, samples.seed) == (1, 5)
    assert set(samples.select(["input_ids"])[0]) == {"input_ids"}


def test_padding_to_the_length_limit():
    batching = Batching(max_length=4, padding="max_length")
    samples = Samples.of(["a"], tokenizer=Words(), batching=batching)
    assert samples[0]["attention_mask"].tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "there are no samples"),
        (["a text"], "texts need a tokenizer"),
        ("a text", "got one text; wrap it in a list"),
        ({"x": ids([1])}, "got one dict; wrap it in a list"),
        ([{"x": ids([1])}, 7], "sample 1 is a int"),
        ([{"x": ids([1])}, "mixed"], "sample 1 is a str"),
        (
            [{"x": torch.zeros(2)}, {"y": {"z": torch.tensor([0.0, float("nan")])}}],
            r"input 'y\.z' of sample 1 holds NaN in 1 of 2 entries",
        ),
        ([{"x": torch.tensor([float("inf")])}], "holds Inf in 1 of 1"),
    ],
)
def test_what_is_refused(source: Any, message: str):
    with pytest.raises(SamplesError, match=message):
        Samples.of(source)


def test_texts_without_tokens_are_refused():
    with pytest.raises(SamplesError, match="no tokens at all"):
        Samples.of(["", " "], tokenizer=Words())
    with pytest.raises(ValueError, match="at least 1"):
        Batching(batch_size=0)


def literal_digest(batches: list[dict[str, torch.Tensor]]) -> str:
    """The digest as its docstring says it, for contiguous integer tensors."""
    text = b""
    for batch in batches:
        text += b"batch"
        for name in sorted(batch):
            value = batch[name]
            text += f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode()
            text += value.numpy().tobytes()
    return hashlib.sha256(text).hexdigest()


def test_the_digest_covers_names_dtypes_shapes_and_bytes():
    x = torch.arange(6).reshape(2, 3)
    base = Samples.of([{"x": x, "y": x + 1}])
    assert base.digest == literal_digest([{"y": x + 1, "x": x}])
    others = [
        [{"x": x, "z": x + 1}],
        [{"x": x, "y": x + 2}],
        [{"x": x.int(), "y": x + 1}],
        [{"x": x.reshape(3, 2), "y": x + 1}],
        [{"x": x}, {"y": x + 1}],
        [{"x": x, "y": x + 1}] * 2,
    ]
    digests = {Samples.of(other).digest for other in others}
    assert len(digests | {base.digest}) == len(others) + 1


@settings(max_examples=30)
@given(st.lists(st.integers(-100, 100).map(float), min_size=2))
def test_the_digest_is_that_of_the_values_not_of_the_memory(values: list[float]):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.tensor(values, dtype=dtype)
        strided = torch.stack([x, x + 1], 1)[:, 0]
        assert Samples.of([{"x": x}]).digest == Samples.of([{"x": strided}]).digest


def test_bytes_and_take():
    samples = Samples.of([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(1, 3)}])
    assert samples.bytes() == 4 * 9
    assert len(samples.take(1)) == 1
    assert Samples.of(samples) is samples
