"""Rotary position embedding, in the spellings of published models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lamella.rewrite.canonical.rotary import rotary_of_halves
from tests.unit.written import canonical, graph_of, operators, random

lam = torch.ops.lamella
X = random(2, 4, 5, 8)
ANGLES = random(5, 4, seed=1)
HALVES = torch.cat([ANGLES, ANGLES], -1)
PAIRS = ANGLES.repeat_interleave(2, -1)
AXES = {"a": (0, 2), "b": (0,), "c": (0,)}


def by_slices(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


def by_chunks(x: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat((-two, one), dim=-1)


def by_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def table_of_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


HALF: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "slices": lambda x, c, s: x * c + by_slices(x) * s,
    "chunks": lambda x, c, s: by_chunks(x) * s + c * x,
    "after unsqueeze": lambda x, c, s: (
        x * c[None].unsqueeze(1) + by_slices(x) * s[None].unsqueeze(1)
    ),
}


@pytest.mark.parametrize("name", HALF)
def test_rotated_halves_are_raised(name: str) -> None:
    graph, _ = canonical(HALF[name], X, HALVES.cos(), HALVES.sin(), dynamic=AXES)
    (node,) = graph.find(lam.rotary_embedding.default)
    assert not graph.operand(node, "interleaved")
    assert set(operators(graph)) <= {"rotary_embedding", "unsqueeze"}


def test_rotated_pairs_are_raised() -> None:
    graph, _ = canonical(
        lambda x, c, s: x * c + by_pairs(x) * s, X, PAIRS.cos(), PAIRS.sin(), dynamic=AXES
    )
    (node,) = graph.find(lam.rotary_embedding.default)
    assert graph.operand(node, "interleaved")
    assert operators(graph) == {"rotary_embedding": 1}


def test_tables_of_half_the_width_are_doubled() -> None:
    graph, _ = canonical(table_of_halves, X, ANGLES.cos(), ANGLES.sin(), dynamic=AXES)
    assert operators(graph) == {"cat": 2, "rotary_embedding": 1}


def test_a_part_of_the_channels_is_rotated() -> None:
    def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, kept = x[..., :4], x[..., 4:]
        return torch.cat([turned * cos + by_slices(turned) * sin, kept], -1)

    narrow = torch.cat([ANGLES[:, :2]] * 2, -1)
    graph, _ = canonical(partial, X, narrow.cos(), narrow.sin(), dynamic=AXES)
    assert operators(graph) == {"slice": 2, "rotary_embedding": 1, "cat": 1}


def test_queries_and_keys_share_the_tables() -> None:
    def both(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        one = x * cos.unsqueeze(0) + by_slices(x) * sin.unsqueeze(0)
        return one + (2 * x) * cos.unsqueeze(0) + by_slices(2 * x) * sin.unsqueeze(0)

    graph, _ = canonical(both, X, HALVES.cos(), HALVES.sin(), dynamic=AXES)
    assert operators(graph)["unsqueeze"] == 2


def test_near_misses_say_what_is_wrong() -> None:
    def third(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., 3:], x[..., :3]], -1) * sin

    graph, report = canonical(third, X, HALVES.cos(), HALVES.sin(), dynamic=AXES)
    assert "rotary_embedding" not in operators(graph)
    assert [miss.reason for miss in report.near_misses] == ["the slices are not the two halves"]

    def unsigned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos + torch.cat([x[..., 4:], x[..., :4]], -1) * sin

    other = graph_of(unsigned, X, HALVES.cos(), HALVES.sin(), dynamic=AXES)
    assert rotary_of_halves.explain(other, other.outputs[0]).endswith(
        "slice_1 (aten.slice.Tensor) is not aten.neg.default"
    )
