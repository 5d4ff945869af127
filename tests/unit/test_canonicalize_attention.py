"""Attention written out becomes one operator, and what is no attention says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.written import canonical, operators, random, run

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
Q, K, V = random(2, 4, 5, 8), random(2, 4, 5, 8, seed=1), random(2, 4, 5, 8, seed=2)
AXES = {"a": (0, 2), "b": (0, 2), "c": (0, 2), "d": (0, 2, 3)}
HIDDEN = torch.triu(torch.ones(5, 5), 1).bool()
LOWEST = torch.finfo(torch.float64).min


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *masks: Tensor, scale: float = 1.0
) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    for mask in masks:
        scores = scores + mask
    return torch.softmax(scores, -1) @ v


WRITTEN: dict[str, tuple[Callable[..., Tensor], float]] = {
    "bare": (softmax_attention, 1.0),
    "scaled": (lambda q, k, v: softmax_attention(q, k, v, scale=0.25), 0.25),
    "divided": (
        lambda q, k, v: torch.softmax((q @ k.mT) / math.sqrt(8), -1) @ v,
        1 / math.sqrt(8),
    ),
    "scaled query": (lambda q, k, v: softmax_attention(q * 0.5, k, v), 0.5),
    "both scaled": (lambda q, k, v: softmax_attention(q * 0.5, k * 0.5, v), 0.25),
    "in single precision": (
        lambda q, k, v: torch.softmax(q @ k.mT, dim=-1, dtype=torch.float64).to(q.dtype) @ v,
        1.0,
    ),
    "keys turned before": (
        lambda q, k, v: torch.softmax(q @ k.permute(0, 1, 3, 2) * 0.125, -1) @ v,
        0.125,
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_softmax_attention_is_raised(name: str) -> None:
    function, scale = WRITTEN[name]
    graph, _ = canonical(function, Q, K, V, dynamic=AXES)
    (node,) = graph.find(SDPA)
    assert operators(graph) == {"scaled_dot_product_attention": 1}
    assert graph.operand(node, "scale") == pytest.approx(scale, rel=1e-12)
    assert graph.operand(node, "attn_mask") is None


def masked_by_fill(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.125).masked_fill(hidden, LOWEST)
    return torch.softmax(scores, -1) @ v


MASKED: dict[str, Callable[..., Tensor]] = {
    "added": lambda q, k, v, m: softmax_attention(q, k, v, m.double() * LOWEST, scale=0.125),
    "two added": lambda q, k, v, m: softmax_attention(
        q, k, v, m.double() * -1e30, m.double().mT * 2.0
    ),
    "filled": masked_by_fill,
    "where": lambda q, k, v, m: (
        torch.softmax(torch.where(~m, q @ k.mT, torch.tensor(LOWEST)), -1) @ v
    ),
    "where with infinity": lambda q, k, v, m: (
        torch.softmax(torch.where(m, -math.inf, q @ k.mT), -1) @ v
    ),
    "filled and added": lambda q, k, v, m: (
        torch.softmax((q @ k.mT).masked_fill(m, LOWEST) + m.double(), -1) @ v
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_become_the_mask_of_the_operator(name: str) -> None:
    graph, _ = canonical(MASKED[name], Q, K, V, HIDDEN, dynamic=AXES | {"d": (0, 1)})
    (node,) = graph.find(SDPA)
    assert graph.operand(node, "attn_mask") is not None
    assert not {"softmax", "matmul"} & set(operators(graph))


def test_a_row_that_sees_nothing_stays_what_it_was() -> None:
    nothing = torch.ones(5, 5).bool()
    graph, _ = canonical(masked_by_fill, Q, K, V, HIDDEN, dynamic=AXES | {"d": (0, 1)})
    expected = masked_by_fill(Q, K, V, nothing)
    # Adding to the lowest number rounds back to it: all keys weigh the same, as before.
    torch.testing.assert_close(run(graph, Q, K, V, nothing), expected, rtol=1e-12, atol=1e-12)


def test_attention_of_three_axes() -> None:
    def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)

    graph, _ = canonical(batched, Q[0], K[0], V[0], dynamic={"a": (1,), "b": (1,), "c": (1,)})
    assert operators(graph) == {"scaled_dot_product_attention": 1}


NOT: dict[str, tuple[Callable[..., Any], str]] = {
    "soft cap": (
        lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT / 50) * 50, -1) @ v,
        "between product and softmax stands tanh (aten.tanh.default), which is neither a factor "
        "nor a mask",
    ),
    "axis": (
        lambda q, k, v: torch.softmax(q @ k.mT, 1) @ v,
        "the softmax is over axis 1, not over the keys",
    ),
    "weak mask": (
        lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(q[..., :1] > 0, -10.0), -1) @ v,
        "scores are replaced at masked_fill by -10.0, not by a number below -1e+20",
    ),
    "scores are an output": (
        lambda q, k, v: next((torch.softmax(s, -1) @ v, s) for s in [q @ k.mT * 2]),
        "the scores mul are read by output too",
    ),
    "probabilities are an output": (
        lambda q, k, v: next((p @ v, p) for p in [torch.softmax(q @ k.mT, -1)]),
        "softmax is read outside of the pattern too",
    ),
    "scaled after the mask": (
        lambda q, k, v: torch.softmax((q @ k.mT + q[..., :1]) / 8, -1) @ v,
        "the scores are scaled at div after a mask was added",
    ),
    "gated": (
        lambda q, k, v: torch.softmax(q @ k.mT * q[..., :1], -1) @ v,
        "the scores are multiplied at mul by something that is no number",
    ),
}


@pytest.mark.parametrize("name", NOT)
def test_near_misses_name_the_condition_and_the_node(name: str) -> None:
    function, reason = NOT[name]
    graph, report = canonical(function, Q, K, V, dynamic=AXES)
    assert not graph.find(SDPA)
    assert [miss.reason for miss in report.near_misses] == [reason]


def repeat_by_expand(x: Tensor, times: int) -> Tensor:
    batch, heads, length, width = x.shape
    wide = x[:, :, None, :, :].expand(batch, heads, times, length, width)
    return wide.reshape(batch, heads * times, length, width)


def repeat_by_interleave(x: Tensor, times: int) -> Tensor:
    return torch.repeat_interleave(x, times, dim=1)


@pytest.mark.parametrize("repeat", [repeat_by_expand, repeat_by_interleave])
@pytest.mark.parametrize("heads", [1, 2])
def test_repeated_heads_are_grouped(repeat: Callable[..., Tensor], heads: int) -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = q.shape[1] // k.shape[1]
        return F.scaled_dot_product_attention(q, repeat(k, times), repeat(v, times))

    graph, _ = canonical(grouped, Q, K[:, :heads], V[:, :heads], dynamic=AXES)
    (node,) = graph.find(SDPA)
    assert operators(graph) == {"scaled_dot_product_attention": 1}
    assert graph.operand(node, "enable_gqa") is True
    longer = [random(3, size, 9, 8, seed=size) for size in (4, heads, heads)]
    expected = grouped(*longer)
    torch.testing.assert_close(run(graph, *longer), expected, rtol=1e-12, atol=1e-12)


def test_repeated_heads_of_softmax_attention_are_grouped() -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, repeat_by_expand(k, 2), repeat_by_expand(v, 2), scale=0.125)

    graph, _ = canonical(grouped, Q, K[:, :2], V[:, :2], dynamic=AXES)
    assert operators(graph) == {"scaled_dot_product_attention": 1}


def test_heads_repeated_as_blocks_are_not_grouped() -> None:
    def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    graph, _ = canonical(blocks, Q, K[:, :2], V[:, :2], dynamic=AXES)
    assert operators(graph) == {"repeat": 2, "scaled_dot_product_attention": 1}


def test_the_arguments_of_attention_are_written_out() -> None:
    graph, _ = canonical(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        Q,
        K,
        V,
        dynamic=AXES,
    )
    (node,) = graph.find(SDPA)
    assert node.args[3:] == (None, 0.0, True)
    assert node.kwargs == {"scale": 1 / math.sqrt(8), "enable_gqa": False}


def test_masks_of_published_models_become_small() -> None:
    def model(q: Tensor, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape[0], q.shape[2]
        rows, columns = torch.arange(length)[:, None], torch.arange(length)[None, :]
        keep = tokens.to(torch.bool)[torch.arange(batch)[:, None, None, None], columns[None, None]]
        everything = rows.new_ones((), dtype=torch.bool) & (rows >= 0)[None, None]
        mask = (everything & keep).expand(batch, 1, length, length)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    tokens = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    graph, _ = canonical(model, Q, tokens, dynamic={"a": (0, 2), "b": (0, 1)})
    (node,) = graph.find(SDPA)
    mask = graph.operand(node, "attn_mask")
    assert [str(size) for size in mask.meta["val"].shape][1:3] == ["1", "1"]
    assert not {"index", "arange", "expand", "logical_and", "full"} & set(operators(graph))


def test_a_mask_that_hides_nothing_goes() -> None:
    graph, _ = canonical(
        lambda q: F.scaled_dot_product_attention(q, q, q, q.new_ones(5, 5, dtype=torch.bool)), Q
    )
    (node,) = graph.find(SDPA)
    assert graph.operand(node, "attn_mask") is None
