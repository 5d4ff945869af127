"""Views, creation and arithmetic: one spelling each, nothing without effect, same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.written import canonical, operators, random, run

X = random(2, 3, 4)
BATCH_AND_LENGTH = {"a": (0, 1)}

VIEWS: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "view": (lambda x: x.view(x.shape[0], -1), {"reshape": 1}),
    "flatten": (lambda x: x.flatten(1), {"reshape": 1}),
    "unflatten": (lambda x: x.unflatten(-1, (2, 2)), {"reshape": 1}),
    "reshape of reshape": (lambda x: x.reshape(-1).reshape(-1, 2), {"reshape": 1}),
    "to its own shape": (lambda x: x.reshape(x.shape).view_as(x), {}),
    "expand to its own shape": (lambda x: x.expand(*x.shape), {}),
    "mT": (lambda x: x.mT, {"transpose": 1}),
    "movedim": (lambda x: x.movedim(0, -1), {"permute": 1}),
    "swapaxes": (lambda x: x.swapaxes(-1, 0), {"transpose": 1}),
    "permute of two axes": (lambda x: x.permute(0, 2, 1), {"transpose": 1}),
    "transpose back": (lambda x: x.transpose(1, 2).permute(0, 2, 1), {}),
    "turned twice": (lambda x: x.transpose(0, 1).mT, {"permute": 1}),
    "permute back": (lambda x: x.permute(2, 0, 1).permute(1, 2, 0), {}),
    "whole slice": (lambda x: x[:, 0:], {}),
    "slice": (lambda x: x[:, 1:], {"slice": 1}),
    "narrow": (lambda x: x.narrow(2, 1, 2), {"slice": 1}),
    "chunk": (lambda x: x.chunk(2, -1)[1], {"split_with_sizes": 1, "getitem": 1}),
    "split": (lambda x: x.split(3, -1)[0], {"split_with_sizes": 1, "getitem": 1}),
    "split in one": (lambda x: x.split(4, -1)[0], {}),
    "tensor_split": (lambda x: x.tensor_split(3, -1)[2], {"split_with_sizes": 1, "getitem": 1}),
    "unbind": (lambda x: x.unbind(-1)[1], {"select": 1}),
    "squeeze of unsqueeze": (lambda x: x.unsqueeze(1).squeeze(1), {}),
    "unsqueeze of squeeze": (lambda x: x[..., :1].squeeze(-1).unsqueeze(-1), {"slice": 1}),
    "squeeze of long axis": (lambda x: x.squeeze(-1), {}),
    "repeat once": (lambda x: x.repeat(1, 1, 1), {}),
    "tile": (lambda x: x.tile(2), {"repeat": 1}),
    "pad by nothing": (lambda x: F.pad(x, (0, 0, 0, 0)), {}),
    "pad": (lambda x: torch.ops.aten.constant_pad_nd(x, [1, 2], 3.0), {"pad": 1}),
    "cat of one": (lambda x: torch.cat([x], -1), {}),
    "diff": (lambda x: x.diff(), {"slice": 2, "sub": 1}),
    "diff with more": (lambda x: x.diff(prepend=x[..., :1]), {"cat": 1, "slice": 3, "sub": 1}),
    "copies": (lambda x: x.clone().contiguous().detach(), {}),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), {}),
    "broadcast": (lambda x: torch.broadcast_to(x[:1], x.shape), {"slice": 1, "expand": 1}),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_have_one_spelling(name: str) -> None:
    function, expected = VIEWS[name]
    counts = operators(canonical(function, X, dynamic=BATCH_AND_LENGTH)[0])
    counts.pop("sym_size", None)
    assert counts == expected


ARITHMETIC: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "neutral": (lambda x: (x + 0) * 1 / 1 - 0, {}),
    "alpha": (lambda x: torch.add(x, x, alpha=2), {"mul": 1, "add": 1}),
    "alpha of a number": (lambda x: torch.sub(x, 3, alpha=2), {"sub": 1}),
    "rsub": (lambda x: 1 - x, {"rsub": 1}),
    "rsub of a tensor": (lambda x: torch.rsub(x, x.sin()), {"sin": 1, "sub": 1}),
    "true_divide": (lambda x: torch.true_divide(x, 3), {"div": 1}),
    "square": (torch.square, {"pow": 1}),
    "power of a number": (lambda x: torch.pow(x.abs(), torch.tensor(0.5)), {"abs": 1, "pow": 1}),
    "clamp_min": (lambda x: x.clamp_min(0.5), {"clamp": 1}),
    "relu by clamp": (lambda x: x.clamp(min=0), {"relu": 1}),
    "relu6": (F.relu6, {"clamp": 1}),
    "maximum": (lambda x: torch.max(x, x.sin()), {"sin": 1, "maximum": 1}),
    "addcmul": (lambda x: torch.addcmul(x, x, x, value=2), {"mul": 2, "add": 1}),
    "lerp": (lambda x: torch.lerp(x, x.sin(), 0.25), {"sin": 1, "sub": 1, "mul": 1, "add": 1}),
    "softmax dtype": (
        lambda x: torch.softmax(x, -1, dtype=torch.float32),
        {"to": 1, "softmax": 1},
    ),
    "and": (lambda x: (x > 0) & (x < 1), {"gt": 1, "lt": 1, "logical_and": 1}),
    "not": (lambda x: ~(x > 0), {"gt": 1, "logical_not": 1}),
    "and of integers": (lambda x: x.long() & 3, {"to": 1, "full": 1, "bitwise_and": 1}),
    "xor": (lambda x: (x > 0) ^ (x < 1), {"gt": 1, "lt": 1, "ne": 1}),
    "type_as": (lambda x: x.type_as(x.float()), {"to": 1}),
    "there and back": (lambda x: x.float().double().float(), {"to": 1}),
    "wider and back": (lambda x: x.float().sin().double().float(), {"to": 1, "sin": 1}),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_has_one_spelling(name: str) -> None:
    function, expected = ARITHMETIC[name]
    counts = operators(canonical(function, X)[0])
    assert counts == expected


CREATION: dict[str, Callable[..., Any]] = {
    "arange": lambda x: x[..., 0] + torch.arange(x.shape[1]),
    "arange from": lambda x: x[..., 0] + torch.arange(1, x.shape[1] + 1, dtype=torch.float64),
    "ones": lambda x: x + torch.ones(x.shape, dtype=torch.float64),
    "zeros_like": lambda x: x + torch.zeros_like(x) + x.new_ones(4),
    "full_like": lambda x: torch.full_like(x, 3.5) * x,
    "new_full": lambda x: x.new_full((x.shape[0], 1, 4), 2.0) + x,
}


@pytest.mark.parametrize("name", CREATION)
def test_tensors_from_nothing_have_one_spelling_and_stay_dynamic(name: str) -> None:
    function = CREATION[name]
    graph, _ = canonical(function, X)
    made = {op for op in operators(graph) if op not in ("add", "mul", "select", "sym_size")}
    assert made <= {"arange", "full"}
    larger = random(5, 7, 4, seed=1)
    torch.testing.assert_close(run(graph, larger), function(larger), rtol=1e-12, atol=1e-12)


def test_dynamic_sizes_stay_dynamic_through_reshapes() -> None:
    def heads(x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = x.view(batch, length, 2, -1).transpose(1, 2)
        return split.transpose(1, 2).contiguous().view(batch, length, -1).flatten(0, 1)

    graph, _ = canonical(heads, X, dynamic=BATCH_AND_LENGTH)
    assert operators(graph) == {"reshape": 1}
    larger = random(5, 7, 4, seed=1)
    torch.testing.assert_close(run(graph, larger), heads(larger), rtol=0, atol=0)


@pytest.mark.parametrize("length", [6, 7, 8])
def test_parts_of_an_axis_of_any_size(length: int) -> None:
    def parts(x: Tensor) -> tuple[Tensor, ...]:
        one, two, three = x.chunk(3, 1)
        return one, two, three, *x[:, :6].split(2, 1)

    graph, _ = canonical(parts, random(2, 7, 4))
    assert "chunk" not in operators(graph)
    other = random(3, length, 4)
    for got, expected in zip(run(graph, other), parts(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_equal_calls_become_one() -> None:
    graph, report = canonical(lambda x: torch.sin(x) + torch.cos(torch.sin(x)), X)
    assert operators(graph) == {"sin": 1, "cos": 1, "add": 1}
    assert report.counts["share"] == 1


def test_calls_with_other_constants_stay_apart() -> None:
    graph, _ = canonical(lambda x: (x > 0).to(torch.int64) * 1 + (x > 0).sum() * True, X)
    assert operators(graph)["gt"] == 1
    graph, _ = canonical(lambda x: torch.pow(x, 2) + torch.pow(x, 2.0), X)
    assert operators(graph) == {"pow": 2, "add": 1}


def test_sizes_are_read_from_inputs() -> None:
    graph, _ = canonical(lambda x: x.sin().reshape(x.exp().shape[0], -1), X)
    (size,) = graph.find(torch.ops.aten.sym_size.int)
    assert size.args == (graph.inputs[0], 0)


def test_flattened_rows_keep_their_axes() -> None:
    def branch(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        flat = F.layer_norm(x, (4,)).reshape(-1, 4)
        out = flat + F.linear(F.relu(F.linear(flat, w)), v)
        return out.reshape(x.shape)

    graph, _ = canonical(branch, X, w=random(6, 4, seed=1), v=random(4, 6, seed=2))
    assert operators(graph) == {"layer_norm": 1, "linear": 2, "relu": 1, "add": 1}
