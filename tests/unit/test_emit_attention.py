"""Emitters of attention and rotary embedding, in the standard operators of opset 21 and 23."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.onnx_runs import assert_same, graph_of, op_types

aten = torch.ops.aten
lam = torch.ops.lamella
attend = aten.scaled_dot_product_attention

LENGTHS = {"x": (0, 2), "y": (0, 2), "z": (0, 2)}
"""Batch and sequence of queries, keys and values; heads and widths are fixed."""

OPSETS = pytest.mark.parametrize("opset", [21, 23])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def queries_keys_values(batch: int, queries: int, keys: int, heads: int = 4) -> list[Tensor]:
    return [
        numbers(batch, 4, queries, 8),
        numbers(batch, heads, keys, 8, seed=1),
        numbers(batch, heads, keys, 6, seed=2),
    ]


@OPSETS
def test_attention_without_a_mask(opset: int):
    def every(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return attend(q, k, v), attend(q, k, v, scale=0.3), attend(q, k, v, None, 0.0, True)

    inputs, others = queries_keys_values(2, 5, 7), [queries_keys_values(3, 4, 9)]
    assert_same(every, *inputs, others=others, opset=opset, dynamic=LENGTHS)


@OPSETS
def test_grouped_queries(opset: int):
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, None, 0.0, True, enable_gqa=True)

    inputs, others = queries_keys_values(2, 6, 6, heads=2), [queries_keys_values(3, 4, 4, heads=2)]
    assert_same(grouped, *inputs, others=others, opset=opset, dynamic=LENGTHS)


@OPSETS
@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 4, 5, 7), (5, 7), (2, 1, 1, 7), (4, 1, 7)])
def test_masks_of_every_shape(opset: int, shape: tuple[int, ...]):
    def every(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return attend(q, k, v, mask), attend(q, k, v, aten.gt(mask, 0))

    inputs = [*queries_keys_values(2, 5, 7), numbers(*shape, seed=3)]
    assert_same(every, *inputs, opset=opset, dynamic=False)


@OPSETS
def test_a_query_without_a_key_gives_zeros(opset: int):
    """As PyTorch does for padding on the left; a softmax of nothing would be NaN."""
    mask = torch.ones(5, 5).tril()
    mask[:, :2] = 0

    def masked(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        allowed = aten.gt(m, 0)
        low = aten.masked_fill(aten.mul(m, 0.0), aten.logical_not(allowed), float("-inf"))
        return attend(q, k, v, allowed), attend(q, k, v, low)

    assert_same(masked, *queries_keys_values(2, 5, 5), mask, opset=opset, dynamic=False)


def projected(function: Any) -> Any:
    """Attention as models write it: projections, heads, attention, heads joined."""

    def model(w: Tensor, x: Tensor, *more: Tensor) -> Tensor:
        def heads(weight: Tensor) -> Tensor:
            split = aten.reshape(aten.linear(x, weight), [x.shape[0], x.shape[1], 4, 8])
            return aten.transpose(split, 1, 2)

        q, k, v = (heads(aten.select(w, 0, i)) for i in range(3))
        joined = aten.transpose(function(q, k, v, *more), 1, 2)
        return aten.reshape(joined, [x.shape[0], x.shape[1], 32])

    return model


def test_heads_side_by_side_need_no_transposition():
    model = projected(lambda q, k, v: attend(q, k, v, None, 0.0, True))
    weights = [numbers(3, 32, 16)]
    graph = graph_of(model, numbers(2, 5, 16), weights=weights)
    assert op_types(graph).count("Attention") == 1
    # The three weights are selected from one buffer, so that their layout is turned here.
    assert op_types(graph).count("Transpose") == 3
    assert "Reshape" not in op_types(graph)
    assert_same(model, numbers(2, 5, 16), others=[[numbers(3, 4, 16)]], weights=weights)


def tables(length: int, width: int) -> Tensor:
    """Angles of positions, once per pair of channels."""
    return torch.arange(length)[:, None] * torch.logspace(0, -2, width // 2)[None]


def rotated(q: Tensor, angles: Tensor, *, lone: bool) -> Tensor:
    # Adding says that the sizes agree, which the operator itself doesn't.
    ones = aten.slice(aten.select(q, 1, 0), -1, 0, 1) * 0
    angles = angles + (aten.select(ones, 0, 0) if lone else ones)
    both = aten.unsqueeze(aten.cat([angles, angles], -1), 0 if lone else 1)
    both = aten.unsqueeze(both, 0) if lone else both
    return lam.rotary_embedding(q, aten.cos(both), aten.mul(aten.sin(both), 1.0))


def test_rotary_embedding_with_one_table_for_all_samples():
    def model(q: Tensor, angles: Tensor) -> Tensor:
        return rotated(q, angles, lone=True)

    q, angles = numbers(2, 4, 5, 8), tables(5, 8)
    sizes = {"x": (0, 2), "y": (0,)}
    graph = graph_of(model, q, angles, dynamic=sizes)
    assert op_types(graph).count("RotaryEmbedding") == 1
    others = [[numbers(3, 4, 9, 8), tables(9, 8)]]
    assert_same(model, q, angles, others=others, dynamic=sizes)
    assert_same(model, q, angles, others=others, dynamic=sizes, opset=21)


def test_rotary_embedding_with_a_table_for_each_sample():
    def model(q: Tensor, angles: Tensor) -> Tensor:
        return rotated(q, angles, lone=False)

    def inputs(batch: int, length: int) -> list[Tensor]:
        shifted = torch.stack([tables(length, 8) + row for row in range(batch)])
        return [numbers(batch, 4, length, 8), shifted]

    sizes = {"x": (0, 2), "y": (0, 1)}
    graph = graph_of(model, *inputs(2, 5), dynamic=sizes)
    assert op_types(graph).count("RotaryEmbedding") == 1
    assert_same(model, *inputs(2, 5), others=[inputs(3, 9)], dynamic=sizes)


def test_rotary_embedding_whose_halves_may_differ_is_written_out():
    def model(q: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return lam.rotary_embedding(q, cos, sin), lam.rotary_embedding(q, cos, sin, True)

    inputs = [numbers(2, 4, 5, 8), numbers(1, 1, 5, 8, seed=1), numbers(1, 1, 5, 8, seed=2)]
    assert "RotaryEmbedding" not in op_types(graph_of(model, *inputs, dynamic=False))
    assert_same(model, *inputs, dynamic=False)


def test_rotary_embedding_inside_attention_stays_side_by_side():
    def function(q: Tensor, k: Tensor, v: Tensor, angles: Tensor) -> Tensor:
        q, k = (rotated(x, angles, lone=True) for x in (q, k))
        return attend(q, k, v, None, 0.0, True)

    model, weights = projected(function), [numbers(3, 32, 16)]
    sizes = {"x": (0, 1), "y": (0,)}
    graph = graph_of(model, numbers(2, 5, 16), tables(5, 8), weights=weights, dynamic=sizes)
    kinds = op_types(graph)
    assert (kinds.count("RotaryEmbedding"), kinds.count("Attention")) == (2, 1)
    # Besides the weights, only `rotated` above reads the heads apart, of queries and of keys.
    assert (kinds.count("Transpose"), kinds.count("Reshape")) == (3 + 2, 2)
    others = [[numbers(3, 9, 16), tables(9, 8)]]
    inputs = (numbers(2, 5, 16), tables(5, 8))
    assert_same(model, *inputs, others=others, weights=weights, dynamic=sizes)


def test_attention_without_a_batch():
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)

    inputs = [numbers(4, 5, 8), numbers(4, 7, 8), numbers(4, 7, 8)]
    assert_same(model, *inputs)
