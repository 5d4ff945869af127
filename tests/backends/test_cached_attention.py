"""Attention over caches in ONNX Runtime, in both forms, against its definition in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.backends.decoder import Decoder, GrowingDecoder
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.decoder import OnnxDecoder
from lamella.backends.onnxruntime.emission import Caches
from lamella.backends.onnxruntime.files import MODEL, Scratch, save_model
from lamella.backends.onnxruntime.session import Session
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.backends.torch.eager import EagerBackend
from lamella.ir.cache import CacheLayout, Slot
from lamella.ir.cached_operators import (
    cached_attention,
    cached_head_scan,
    cached_selective_scan,
)
from lamella.ir.graph import Graph
from tests.unit.onnx_runs import graph_of, run_onnx

aten = torch.ops.aten
lam = torch.ops.lamella

# Softmax and products in float32, sums in another order.
CLOSE: dict[str, float] = {"rtol": 0.0, "atol": 2e-6}
VOCABULARY = 11
SIZES = {"x": (0, 1), "y": (0, 1), "z": (0, 2), "u": (0, 2)}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class OnnxModel:
    """A graph as an ONNX file with one session."""

    def __init__(self, graph: Graph, opset: int) -> None:
        self.names = graph.signature.inputs
        self.scratch = Scratch()
        save_model(write_onnx(graph, opset=opset), self.scratch.path)
        self.session = Session(self.scratch.path / MODEL, threads=1)

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        feeds = dict(zip(self.names, values, strict=True))
        return self.session.run(
            {name: feeds[name] for name in self.session.inputs}, self.session.outputs
        )


def looked_up(tables: Sequence[Tensor], tokens: Tensor) -> list[Tensor]:
    return [aten.embedding.default(table, tokens) for table in tables]


def scale_of(groups: int, width: int, seed: int) -> Tensor:
    """Steps of codes; some values are larger than the last code."""
    return 0.01 + 0.01 * numbers(groups, 1, width, seed=seed).abs()


def past_of(codes: bool, *shape: int, seed: int = 0) -> Tensor:
    past = numbers(*shape, seed=seed)
    return (past * 60).round().clamp(-128, 127).to(torch.int8) if codes else past


def step_graph(
    heads: int = 4,
    groups: int = 2,
    width: int = 16,
    value_width: int | None = None,
    masked: bool = True,
    codes: bool = False,
    **options: Any,
) -> Graph:
    """Tokens are looked up as queries, keys and values; the result is called logits."""
    value_width = value_width or width
    tables = [
        numbers(VOCABULARY, heads * width, seed=1),
        numbers(VOCABULARY, groups * width, seed=2),
        numbers(VOCABULARY, groups * value_width, seed=3),
    ]
    bias = options.pop("bias", None)
    scales = [scale_of(groups, width, 10), scale_of(groups, value_width, 11)] if codes else []
    weights = [*tables, *scales] if bias is None else [*tables, *scales, bias]

    def attend(*values: Tensor) -> tuple[Tensor, ...]:
        *held, tokens, mask, past_key, past_value = values
        shapes = ((heads, width), (groups, width), (groups, value_width))
        query, key, value = (
            aten.transpose.int(aten.reshape.default(found, [*tokens.shape, *shape]), 1, 2)
            for found, shape in zip(looked_up(held[:3], tokens), shapes, strict=True)
        )
        seen = mask if masked else None
        extra = held[-1] if bias is not None else None
        settings = {"scale": 0.3, **options}
        if codes:
            settings |= dict(zip(("key_scale", "value_scale"), held[3:5], strict=True))
        out, *present = lam.cached_attention(
            query, key, value, past_key, past_value, seen, extra, **settings
        )
        out = aten.transpose.int(out, 1, 2)
        return aten.reshape.default(out, [*tokens.shape, heads * value_width]), *present

    inputs = (
        torch.ones(2, 3, dtype=torch.int64),
        torch.ones(2, 8, dtype=torch.int64),
        past_of(codes, 2, groups, 5, width),
        past_of(codes, 2, groups, 5, value_width),
    )
    graph = graph_of(attend, *inputs, weights=weights, dynamic=SIZES)
    names = graph.signature.outputs
    dtype = "int8" if codes else "float32"
    slots = (
        Slot(0, "key", "z", names[1], (groups, -1, width), dtype),
        Slot(0, "value", "u", names[2], (groups, -1, value_width), dtype),
    )
    graph.cache = CacheLayout("x", "y", None, "index", names[0], (), slots)
    return graph


FORMS = {
    "grouped": {},
    "every head its own": {"groups": 4},
    "one for all": {"groups": 1},
    "narrow": {"width": 8},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "capped": {"softcap": 0.7},
    "capped window": {"softcap": 0.7, "window": 4},
    "without a mask": {"masked": False},
    "bias of heads": {"bias": numbers(1, 4, 1, 1, seed=5)},
    "codes": {"codes": True},
    "codes in a window": {"codes": True, "window": 3},
    "codes, capped": {"codes": True, "softcap": 0.7},
}
"""Attentions that fit into buffers."""

OTHERS = {
    "width no multiple of 8": {"width": 12},
    "wider values": {"value_width": 24},
}
"""Attentions that don't."""


def tokens_of(batch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCABULARY, (batch, count), generator=generator)


@functools.cache
def graph_for(form: str) -> Graph:
    return step_graph(**{**FORMS, **OTHERS}[form])


@functools.cache
def decoders(form: str) -> tuple[Decoder, Decoder]:
    """Of ONNX Runtime, and of PyTorch."""
    graph = graph_for(form)
    return OnnxRuntimeBackend(threads=1).decoder(graph), EagerBackend().decoder(graph)


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("form", [*FORMS, *OTHERS])
def test_growing_tensors(opset: int, form: str):
    """Any mask: two tokens hidden on the left, and one in the middle."""
    options = {**FORMS, **OTHERS}[form]
    groups, width = options.get("groups", 2), options.get("width", 16)
    model = OnnxModel(graph_for(form), opset=opset)
    for past, new in ((0, 1), (0, 5), (6, 1), (6, 4)):
        mask = torch.ones(2, past + new, dtype=torch.int64)
        mask[0, :2] = 0
        mask[1, (past + new) // 2] = 0
        values = (
            tokens_of(2, new),
            mask,
            past_of("codes" in options, 2, groups, past, width, seed=8),
            past_of("codes" in options, 2, groups, past, options.get("value_width", width), seed=9),
        )
        expected = graph_for(form)(**dict(zip("xyzu", values, strict=True)))
        for want, got in zip(expected, model(values), strict=True):
            torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_buffers(form: str, batch: int):
    """A prompt, single tokens, and several behind others, which the kernel takes one by one."""
    ours, theirs = decoders(form)
    assert isinstance(ours, OnnxDecoder)
    one, two = ours.start(batch, 4), theirs.start(batch)
    tokens, done = tokens_of(batch, 14), 0
    for new in (4, 1, 1, 5, 1, 2):
        given = tokens[:, done : done + new]
        torch.testing.assert_close(ours.step(one, given), theirs.step(two, given), **CLOSE)
        done += new
    assert one.length == 14


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("without a mask", "bias of heads")])
@pytest.mark.parametrize("first", [1, 4])
def test_padding_on_the_left_needs_no_rows(form: str, first: int):
    ours, theirs = decoders(form)
    one, two = ours.start(3), theirs.start(3)
    tokens, done = tokens_of(3, 12), 0
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, :3], mask[1, :1] = 0, 0
    for new in (first, 3, 1, 2, 1):
        given, seen = tokens[:, done : done + new], mask[:, : done + new]
        got, want = ours.step(one, given, seen), theirs.step(two, given, seen)
        # The logits of hidden tokens are nobody's business.
        read = seen[:, done:].bool()
        torch.testing.assert_close(got[read], want[read], **CLOSE)
        done += new


def test_a_token_hidden_between_others_has_no_row():
    ours, theirs = decoders("grouped")
    one, two = ours.start(2), theirs.start(2)
    tokens, mask = tokens_of(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 2], mask[1, 5] = 0, 0
    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 9)):
        given, seen = tokens[:, start:stop], mask[:, :stop]
        got, want = ours.step(one, given, seen), theirs.step(two, given, seen)
        read = seen[:, start:].bool()
        torch.testing.assert_close(got[read], want[read], **CLOSE)


def test_a_window_counts_what_is_hidden_between_others():
    """Then rows without gaps would be the wrong ones: the growing form goes on."""
    ours, theirs = decoders("window")
    one, two = ours.start(1), theirs.start(1)
    tokens, mask = tokens_of(1, 6), torch.tensor([[1, 1, 0, 1, 1, 1]])
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        given, seen = tokens[:, start:stop], mask[:, :stop]
        got, want = ours.step(one, given, seen), theirs.step(two, given, seen)
        read = seen[:, start:].bool()
        torch.testing.assert_close(got[read], want[read], **CLOSE)


def test_a_query_that_sees_no_key_gives_zeros():
    values = (
        tokens_of(1, 2),
        torch.tensor([[0, 0, 0, 1]]),
        numbers(1, 2, 2, 16),
        numbers(1, 2, 2, 16),
    )
    out = run_onnx(graph_for("grouped"), values)[0]
    assert not out[0, 0].any()
    assert out[0, 1].any()


@pytest.mark.parametrize("form", OTHERS)
def test_what_fits_into_no_buffer_grows(form: str):
    ours, theirs = decoders(form)
    assert isinstance(ours, GrowingDecoder)
    one, two = ours.start(2), theirs.start(2)
    for given in tokens_of(2, 6).split((3, 1, 2), dim=1):
        torch.testing.assert_close(ours.step(one, given), theirs.step(two, given), **CLOSE)


def test_a_long_prompt_is_read_in_parts():
    """Of one sequence, with all logits and with the last ones only."""
    ours, theirs = decoders("grouped")
    tokens = tokens_of(1, 1100)
    want = theirs.step(theirs.start(1), tokens)
    got = ours.step(ours.start(1), tokens)
    # Sums over a thousand keys, with large scores.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    last = ours.step(ours.start(1), tokens, last_only=True)
    torch.testing.assert_close(last, want[:, -1:], rtol=1e-5, atol=2e-5)


def scan_inputs(new: int) -> tuple[Tensor, ...]:
    delta = numbers(2, 5, new, seed=1).abs()
    states = (numbers(2, 3, new, seed=2), numbers(2, 3, new, seed=3), numbers(2, 5, 3, seed=4))
    return numbers(2, 5, new), delta, *states


@pytest.mark.parametrize("new", [1, 6])
def test_a_recurrence_goes_on_from_its_state(new: int):
    a = -numbers(5, 3, seed=6).abs()
    x, delta, b, c, state = scan_inputs(new)

    def scan(a: Tensor, b: Tensor, c: Tensor, x: Tensor, delta: Tensor, s: Tensor) -> Any:
        return lam.cached_selective_scan(x, delta, a, b, c, s)

    graph = graph_of(scan, x, delta, state, weights=(a, b, c), dynamic=False)
    expected = cached_selective_scan(x, delta, a, b, c, state)
    for want, got in zip(expected, run_onnx(graph, (x, delta, state)), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("new", [1, 6])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_recurrence_with_heads_goes_on_from_its_state(new: int, groups: int):
    a = -numbers(4, seed=6).abs()
    x, delta, state = (
        numbers(2, new, 4, 3),
        numbers(2, new, 4, seed=1).abs(),
        numbers(2, 4, 3, 5, seed=2),
    )
    b, c = (numbers(2, new, groups, 5, seed=seed) for seed in (3, 4))

    def scan(a: Tensor, b: Tensor, c: Tensor, x: Tensor, delta: Tensor, s: Tensor) -> Any:
        return lam.cached_head_scan(x, delta, a, b, c, s)

    graph = graph_of(scan, x, delta, state, weights=(a, b, c), dynamic=False)
    expected = cached_head_scan(x, delta, a, b, c, state)
    for want, got in zip(expected, run_onnx(graph, (x, delta, state)), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_a_recurrence_in_two_calls_is_one_recurrence():
    x, delta = numbers(2, 7, 4, 3), numbers(2, 7, 4, seed=1).abs()
    b, c = (numbers(2, 7, 2, 5, seed=seed) for seed in (3, 4))
    a = -numbers(4, seed=6).abs()
    first, state = cached_head_scan(
        *(v[:, :4] for v in (x, delta)), a, b[:, :4], c[:, :4], torch.zeros(2, 4, 3, 5)
    )
    second, _ = cached_head_scan(*(v[:, 4:] for v in (x, delta)), a, b[:, 4:], c[:, 4:], state)
    whole = lam.head_scan(x, delta, a, b, c)
    assert torch.equal(torch.cat((first, second), 1), whole)


def test_the_reference_is_attention_by_hand():
    """One query over three keys, written out."""
    query, key, value = (
        numbers(1, 1, 1, 2),
        numbers(1, 1, 1, 2, seed=1),
        numbers(1, 1, 1, 2, seed=2),
    )
    past_key, past_value = numbers(1, 1, 2, 2, seed=3), numbers(1, 1, 2, 2, seed=4)
    keys, values = torch.cat((past_key, key), 2)[0, 0], torch.cat((past_value, value), 2)[0, 0]
    scores = [0.5 * float(query[0, 0, 0] @ row) for row in keys]
    shares = torch.tensor(scores).exp() / torch.tensor(scores).exp().sum()
    got, *_ = cached_attention(query, key, value, past_key, past_value, None, None, 0.5)
    torch.testing.assert_close(got[0, 0, 0], shares @ values, **CLOSE)


def test_the_mask_says_how_many_rows_are_filled():
    """The form for runners that know no inputs but those of a model; it gives the last logits."""
    graph = graph_for("grouped")
    scratch = Scratch()
    save_model(write_onnx(graph, caches=Caches.SHARED), scratch.path)
    session = Session(scratch.path / MODEL, threads=1)
    assert set(session.inputs) == {"x", "y", "z", "u"}
    _, theirs = decoders("grouped")
    assert graph.cache is not None
    tokens, state, done = tokens_of(1, 7), theirs.start(1), 0
    # What was never written must not be read.
    buffers = {slot.input: torch.full((1, 2, 9, 16), torch.nan) for slot in graph.cache.slots}
    for new in (4, 2, 1):
        given, call = tokens[:, done : done + new], session.bind()
        call.input("x", given.contiguous())
        call.input("y", torch.ones(1, done + new, dtype=torch.int64))
        for slot in graph.cache.slots:
            call.input(slot.input, buffers[slot.input])
            call.output(slot.output, buffers[slot.input])
        call.output(graph.cache.logits, torch.empty(1, 1, 64))
        call.run()
        wanted = theirs.step(state, given)[:, -1:]
        torch.testing.assert_close(call.tensor(graph.cache.logits), wanted, **CLOSE)
        done += new
