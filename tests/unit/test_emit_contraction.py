"""Emitters of products, convolutions, pooling and norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lamella.backends.onnxruntime.writer import write_onnx
from lamella.errors import BackendError
from lamella.ir.capture import capture_module
from tests.unit.onnx_runs import assert_same, graph_of, op_types, run_onnx

aten = torch.ops.aten
lam = torch.ops.lamella


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_linear_layer_is_a_product_with_a_transposed_weight():
    weights = [numbers(6, 8, seed=1), numbers(6, seed=2)]

    def linear(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return aten.linear(x, w, b)

    graph = graph_of(linear, numbers(2, 5, 8), weights=weights)
    assert op_types(graph) == ["MatMul", "Add"]
    stored = write_onnx(graph).graph.initializers["w0"].const_value
    assert stored is not None
    assert stored.shape.numpy() == (8, 6)
    assert_same(linear, numbers(2, 5, 8), others=[[numbers(3, 4, 8)]], weights=weights)


class Tied(nn.Module):
    """An embedding whose table is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids) * 2)


@pytest.mark.parametrize("contrib", [True, False])
def test_a_tied_table_is_stored_once(contrib: bool):
    model, ids = Tied().eval(), torch.tensor([[1, 2, 3], [4, 5, 10]])
    graph = capture_module(model, {"ids": ids})
    graph.finish()
    written = write_onnx(graph, contrib=contrib)
    sizes = [v.const_value.nbytes for v in written.graph.initializers.values() if v.const_value]
    assert sum(sizes) < 1.5 * 11 * 8 * 4
    (got,) = run_onnx(graph, [ids], contrib=contrib)
    # Sums of eight float32 products.
    torch.testing.assert_close(got, model(ids), rtol=1e-6, atol=1e-6)


def test_products():
    def every(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        turned = aten.transpose(y, -1, -2)
        return (
            aten.matmul(x, turned),
            aten.matmul(x, aten.select(turned, 0, 0)),
            aten.einsum("bik,bjk->bij", [x, y]),
            aten.einsum("bik, bjk -> ijb", [x, y]),
            aten.linear(x, aten.select(y, 0, 0)),
        )

    x, y = numbers(2, 5, 4), numbers(2, 3, 4, seed=1)
    assert_same(every, x, y, others=[[numbers(3, 2, 4), numbers(3, 7, 4)]])


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], [2, 3, 1]])
def test_experts_get_their_rows(counts: list[int]):
    """The last case leaves a row that belongs to no expert."""

    def experts(w: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        return lam.grouped_linear(x, w, offsets)

    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    weights = [numbers(3, 6, 4, seed=1)]
    assert_same(experts, numbers(7, 4), offsets, weights=weights)


def test_convolutions():
    def images(w: Tensor, b: Tensor, d: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.conv2d(x, w, b),
            aten.conv2d(x, w, None, [2, 1], [1, 2], [2, 1]),
            aten.conv2d(x, d, None, [1], [1], [1], 4),
            aten.conv_transpose2d(x, t, None, [2, 2], [1, 1], [1, 0], 1, [1, 1]),
        )

    weights = [numbers(6, 4, 3, 3), numbers(6), numbers(4, 1, 3, 3), numbers(4, 5, 3, 3)]
    assert_same(images, numbers(2, 4, 9, 8), others=[[numbers(3, 4, 9, 8)]], weights=weights)

    def sequences(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return aten.conv1d(x, w, None, [2], [1]), aten.conv1d(x, w, None, [1], [4], [2])

    assert_same(
        sequences, numbers(2, 4, 9), others=[[numbers(3, 4, 12)]], weights=[numbers(5, 4, 3)]
    )


def test_pooling():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.max_pool2d(x, [2, 2]),
            aten.max_pool2d(x, [3, 3], [2, 2], [1, 1]),
            aten.max_pool2d(x, [2], [1], [0], [2]),
            aten.avg_pool2d(x, [2, 3], [2, 2]),
            aten.avg_pool2d(x, [3], [2], [1], False, False),
            aten.avg_pool2d(x, [3], [2], [1], False, True),
            aten.avg_pool1d(aten.select(x, 1, 0), [3], [2]),
            aten.adaptive_avg_pool2d(x, [1, 1]),
            aten.adaptive_avg_pool2d(x, [3, 4]),
            aten.adaptive_avg_pool2d(x, [9, 2]),
            aten.adaptive_avg_pool1d(aten.select(x, 1, 0), [4]),
        )

    assert_same(every, numbers(2, 3, 9, 8), others=[[numbers(4, 3, 9, 8)]])


def test_adaptive_pooling_of_an_unknown_size_is_refused():
    graph = graph_of(lambda x: aten.adaptive_avg_pool1d(x, [4]), numbers(2, 3, 9))
    with pytest.raises(BackendError, match="capture with dynamic=False"):
        write_onnx(graph)


def test_images_of_another_size():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.upsample_nearest2d.vec(x, [10, 12], None),
            aten.upsample_nearest2d.vec(x, None, [2.0, 1.5]),
            aten.upsample_bilinear2d.vec(x, [7, 11], False, None),
            aten.upsample_bilinear2d.vec(x, [7, 11], True, None),
            aten.upsample_bicubic2d.vec(x, [7, 11], False, None),
            aten.upsample_bicubic2d.vec(x, None, False, [1.5, 2.5]),
            aten.upsample_bicubic2d.vec(x, [3, 4], True, None),
        )

    assert_same(every, numbers(2, 3, 5, 6), others=[[numbers(3, 3, 5, 6)]])


@pytest.mark.parametrize("opset", [21, 23])
def test_norms(opset: int):
    def every(w: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        wide = aten.expand(w, [4, 6]) + 0
        return (
            aten.layer_norm(x, [6], w, b),
            aten.layer_norm(x, [6], None, None, 1e-3),
            aten.layer_norm(x, [4, 6], wide, None),
            aten.rms_norm(x, [6], w, 1e-6),
            aten.rms_norm(x, [6]),
            aten.rms_norm(x, [4, 6], None, 1e-3),
        )

    weights = [numbers(6, seed=1), numbers(6, seed=2)]
    others = [[numbers(3, 4, 6)]]
    assert_same(every, numbers(2, 4, 6), others=others, weights=weights, opset=opset)


def test_norms_of_channels():
    def every(w: Tensor, b: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.group_norm(x, 2, w, b),
            aten.group_norm(x, 4),
            aten.batch_norm(x, w, b, b, v, False, 0.1, 1e-5, False),
            aten.batch_norm(x, None, None, b, v, False, 0.1, 1e-3, False),
        )

    weights = [numbers(4, seed=1), numbers(4, seed=2), torch.rand(4) + 0.5]
    others = [[numbers(3, 4, 5, 6)]]
    assert_same(every, numbers(2, 4, 5, 6), others=others, weights=weights)


@pytest.mark.parametrize("length", [1, 9])
def test_a_selective_scan_runs_over_the_sequence(length: int):
    def scan(a: Tensor, x: Tensor, delta: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return lam.selective_scan(x, delta, a, b, c)

    def inputs(batch: int, steps: int) -> list[Tensor]:
        x, b, c = (
            numbers(batch, 4, steps),
            numbers(batch, 3, steps),
            numbers(batch, 3, steps, seed=1),
        )
        return [x, numbers(batch, 4, steps, seed=2).abs(), b, c]

    a = -numbers(4, 3, seed=3).abs()
    assert_same(scan, *inputs(2, 5), others=[inputs(3, length)], weights=[a])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_scan_with_heads_runs_over_the_sequence(groups: int):
    def scan(a: Tensor, x: Tensor, delta: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return lam.head_scan(x, delta, a, b, c)

    def inputs(batch: int, steps: int) -> list[Tensor]:
        b, c = (numbers(batch, steps, groups, 5, seed=seed) for seed in (1, 2))
        return [numbers(batch, steps, 4, 3), numbers(batch, steps, 4, seed=3).abs(), b, c]

    a = -numbers(4, seed=4).abs()
    dynamic = {name: [0, 1] for name in "xyzu"}
    assert_same(scan, *inputs(2, 6), others=[inputs(3, 1)], weights=[a], dynamic=dynamic)
