"""Fusions at emission: merged products, residual sums with their norms, logits that are wanted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from lamella.backends.onnxruntime.emission import Caches
from lamella.backends.onnxruntime.emit.rotary_tables import table_of
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.ir.cache import CacheLayout
from lamella.ir.graph import Graph
from lamella.ir.packing import pack
from tests.unit.onnx_runs import graph_of, run_onnx

aten = torch.ops.aten
lam = torch.ops.lamella

# Products and norms in float32, sums in another order.
CLOSE: dict[str, float] = {"rtol": 0.0, "atol": 5e-6}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cached(graph: Graph, mask: str = "y") -> Graph:
    """`graph` as if it continued from a cache without slots."""
    names = graph.signature
    graph.cache = CacheLayout(names.inputs[0], mask, None, "index", names.outputs[0], (), ())
    return graph


def types(graph: Graph, **options: Any) -> Counter[str]:
    return Counter(node.op_type for node in write_onnx(graph, **options).graph)


def assert_same(graph: Graph, *values: Tensor) -> None:
    want = graph(**dict(zip("xyz", values, strict=False)))
    want = list(want) if isinstance(want, tuple | list) else [want]
    for one, two in zip(run_onnx(graph, values), want, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


def three(*weights: Tensor) -> Any:
    def project(*values: Tensor) -> tuple[Tensor, ...]:
        *held, x = values
        return tuple(aten.linear.default(x, w) for w in held[: len(weights)])

    return project


def test_products_of_one_value_are_merged_in_a_decoder():
    weights = [numbers(6, 8, seed=1), numbers(4, 8, seed=2), numbers(4, 8, seed=3)]
    graph = graph_of(three(*weights), numbers(2, 3, 8), weights=weights)
    assert types(graph)["MatMul"] == 3
    assert types(cached(graph, "x")) == {"MatMul": 1, "Split": 1}
    assert types(graph, contrib=False)["MatMul"] == 3
    assert_same(graph, numbers(2, 3, 8, seed=4))


def test_products_with_a_bias_are_merged_with_their_like():
    weights = [numbers(6, 8, seed=1), numbers(4, 8, seed=2), numbers(5, 8, seed=3)]
    biases = [numbers(6, seed=4), numbers(4, seed=5)]

    def project(*values: Tensor) -> tuple[Tensor, ...]:
        a, b, c, one, two, x = values
        linear = aten.linear.default
        return linear(x, a, one), linear(x, c), linear(x, b, two)

    graph = cached(graph_of(project, numbers(2, 3, 8), weights=[*weights, *biases]), "x")
    assert types(graph) == {"MatMul": 2, "Add": 1, "Split": 1}
    assert_same(graph, numbers(2, 3, 8, seed=6))


def test_a_matrix_with_two_readers_is_not_merged():
    weights = [numbers(8, 8, seed=1), numbers(4, 8, seed=2)]

    def project(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        first = aten.linear.default(x, a)
        return aten.linear.default(first, a), aten.linear.default(x, b)

    graph = cached(graph_of(project, numbers(2, 3, 8), weights=weights), "x")
    assert types(graph)["Split"] == 0
    assert_same(graph, numbers(2, 3, 8, seed=3))


def packed(rows: int, columns: int, block: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns // block, block), generator=generator)
    scales = numbers(rows, columns // block, seed=seed).abs() / 10
    return pack(codes, 4), scales


@pytest.mark.parametrize(("blocks", "merged"), [((32, 32), 1), ((32, 64), 2)])
def test_products_of_few_bits_are_merged_when_their_formats_agree(blocks, merged):
    weights = [*packed(6, 64, blocks[0], 1), *packed(10, 64, blocks[1], 2)]

    def project(*values: Tensor) -> tuple[Tensor, ...]:
        a, of_a, b, of_b, x = values
        settings = (None, None, 4)
        return (
            lam.linear_nbits(x, a, of_a, *settings, blocks[0], False),
            lam.linear_nbits(x, b, of_b, *settings, blocks[1], False),
        )

    graph = cached(graph_of(project, numbers(2, 3, 64), weights=weights), "x")
    assert types(graph)["MatMulNBits"] == merged
    assert_same(graph, numbers(2, 3, 64, seed=3))


def residual(weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    total = aten.add.Tensor(x, y)
    return aten.rms_norm.default(total, [8], weight, 1e-5), aten.mul.Tensor(total, 2.0)


def test_a_sum_and_its_norm_are_one_operator():
    graph = graph_of(residual, numbers(2, 3, 8), numbers(2, 3, 8), weights=[numbers(8, seed=1)])
    assert types(graph) == {"SkipSimplifiedLayerNormalization": 1, "Mul": 1}
    assert types(graph, contrib=False) == {"Add": 1, "RMSNormalization": 1, "Mul": 1}
    assert_same(graph, numbers(2, 3, 8, seed=2), numbers(2, 3, 8, seed=3))


def test_a_sum_that_broadcasts_stays_a_sum():
    graph = graph_of(residual, numbers(2, 3, 8), numbers(3, 8), weights=[numbers(8, seed=1)])
    assert types(graph) == {"Add": 1, "RMSNormalization": 1, "Mul": 1}
    assert_same(graph, numbers(2, 3, 8, seed=2), numbers(3, 8, seed=3))


def named_inputs(model: ir.Model) -> list[str]:
    return [str(value.name) for value in model.graph.inputs]


def test_the_head_sees_the_rows_that_are_wanted():
    """Before the last product, also when a cap follows it."""

    def head(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        logits = aten.linear.default(aten.relu.default(x), weight)
        capped = aten.tanh.default(aten.div.Tensor(logits, 30.0))
        return aten.mul.Tensor(capped, 30.0)

    inputs = (numbers(2, 3, 8), torch.ones(2, 5, dtype=torch.int64))
    graph = cached(graph_of(head, *inputs, weights=[numbers(9, 8, seed=1)]))
    model = write_onnx(graph, caches=Caches.BOUND)
    order = [node.op_type for node in model.graph]
    assert order.index("GatherND") < order.index("MatMul") < order.index("Tanh")
    assert named_inputs(model) == ["x", "rows"]


def test_logits_without_a_head_lose_rows_at_the_end():
    def twice(x: Tensor, y: Tensor) -> Tensor:
        return aten.add.Tensor(aten.relu.default(x), x)

    graph = cached(graph_of(twice, numbers(2, 3, 8), torch.ones(2, 5, dtype=torch.int64)))
    order = [node.op_type for node in write_onnx(graph, caches=Caches.BOUND).graph]
    assert order == ["Relu", "Add", "GatherND"]


def rotated(frequencies: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Queries ``z`` rotated by the positions ``x``; ``y`` is the mask."""
    angles = aten.mul.Tensor(
        aten.to.dtype(aten.unsqueeze.default(x, 2), torch.float32), frequencies
    )
    angles = aten.unsqueeze.default(aten.cat.default([angles, angles], 2), 1)
    return lam.rotary_embedding(z, aten.cos.default(angles), aten.sin.default(angles))


def rotary_graph(function: Any = rotated) -> Graph:
    ones = torch.ones(2, 3, dtype=torch.int64)
    weights = [torch.tensor([1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.005])]
    inputs = (ones, torch.ones(2, 5, dtype=torch.int64), numbers(2, 4, 3, 16))
    graph = graph_of(function, *inputs, weights=weights)
    graph.cache = CacheLayout("z", "y", "x", "index", graph.signature.outputs[0], (), ())
    return graph


def test_angles_of_all_positions_are_a_table():
    graph = rotary_graph()
    table = table_of(graph, graph.find(lam.rotary_embedding.default)[0])
    assert table is not None
    assert table.cos.shape == (4096, 8)
    # Row 100 of the fourth frequency, 0.1; the tables are computed in float32.
    torch.testing.assert_close(table.cos[100, 3], torch.tensor(10.0).cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(table.sin[100, 3], torch.tensor(10.0).sin(), rtol=0, atol=1e-5)


def test_angles_that_depend_on_more_than_positions_are_no_table():
    def by_mask(frequencies: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        shifted = aten.add.Tensor(x, aten.sum.dim_IntList(y, [1], True))
        return rotated(frequencies, shifted, y, z)

    def halves_differ(frequencies: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        angles = aten.to.dtype(aten.unsqueeze.default(x, 2), torch.float32)
        one = aten.mul.Tensor(angles, frequencies)
        both = aten.unsqueeze.default(aten.cat.default([one, aten.mul.Tensor(one, 2.0)], 2), 1)
        return lam.rotary_embedding(z, aten.cos.default(both), aten.sin.default(both))

    for function in (by_mask, halves_differ):
        graph = rotary_graph(function)
        assert table_of(graph, graph.find(lam.rotary_embedding.default)[0]) is None
