"""Emitters of reductions, orders, reads by index, and what is made from nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lamella.backends.onnxruntime.writer import write_onnx
from lamella.errors import BackendError
from tests.unit.onnx_runs import assert_same, graph_of, run_onnx

aten = torch.ops.aten


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, low: int = 0, high: int = 9, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)


def test_reductions_of_floats():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.mean(x, [-1], True),
            aten.mean(x),
            aten.mean(x, [0, 2]),
            aten.sum(x, [1]),
            aten.sum(x),
            aten.sum(x, [0], dtype=torch.float64),
            aten.amax(x, [-1], True),
            aten.amin(x, [0, 1]),
            aten.amax(x),
            aten.prod(x, 1),
            aten.cumsum(x, -1),
            aten.argmax(x, -1),
            aten.argmax(x),
            aten.argmax(x, 0, True),
            aten.linalg_vector_norm(x, 2, [-1], True),
            aten.linalg_vector_norm(x, 1, [0]),
            aten.linalg_vector_norm(x, 3, [1]),
            aten.linalg_vector_norm(x, float("inf"), [-1]),
            aten.linalg_vector_norm(x),
            aten.softmax(x, -1),
            aten.softmax(x, 1, torch.float64),
            aten.log_softmax(x, -1),
        )

    assert_same(every, numbers(3, 4, 5), others=[[numbers(2, 7, 3)]])


def test_reductions_of_integers_and_truths():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        flags = aten.gt(x, 4)
        return (
            aten.sum(x, [1]),
            aten.sum(flags),
            aten.cumsum(flags, 1),
            aten.cumsum(x, 0),
            aten.any(flags, 1),
            aten.all(flags, 0, True),
            aten.any(x, -1),
            aten.amax(x, [0]),
            aten.argmax(x, -1),
            aten.argmax(aten.to(flags, torch.int32), -1),
        )

    assert_same(every, integers(3, 5), others=[[integers(2, 8)]])


@pytest.mark.parametrize("correction", [0, 1, 2])
def test_variance_of_fixed_and_of_symbolic_axes(correction: int):
    def every(x: Tensor) -> tuple[Tensor, ...]:
        fixed = aten.var(x, [-1], correction=correction, keepdim=True)
        return fixed, aten.var(x, [0, 1], correction=correction), aten.var(x, correction=correction)

    assert_same(every, numbers(3, 4, 5), others=[[numbers(2, 7, 5)]])


def test_orders():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            *aten.topk(x, 2, -1),
            *aten.topk(x, 3, 0, False),
            *aten.sort(x, -1),
            *aten.sort(x, 0, True),
        )

    assert_same(every, numbers(4, 5), others=[[numbers(3, 6)]])


def test_equal_entries_keep_their_order_in_a_sort():
    """Routers of experts sort expert numbers, most of which are equal."""
    x = integers(64, high=4)
    _, order = run_onnx(graph_of(lambda x: tuple(aten.sort(x, 0)), x), [x])
    assert torch.equal(order, torch.sort(x, stable=True).indices)


def test_histograms_count_like_pytorch():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.histc(x, 4, 0, 3),
            aten.histc(x, 5, -1, 1.5),
            aten.histc(aten.reshape(x, [-1]), 8, 0, 8),
        )

    x = integers(40, low=-1, high=6).float()
    assert_same(every, x, others=[[integers(9, high=9).float()], [numbers(30)]])


def test_a_histogram_with_bounds_from_the_data_is_refused():
    graph = graph_of(lambda x: aten.histc(x, 4, 0, 0), numbers(9))
    with pytest.raises(BackendError, match=r"node histc \(aten.histc.default\).*bounds from the"):
        write_onnx(graph)


def test_reads_by_index():
    def every(x: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.embedding(x, i),
            aten.index_select(x, 1, aten.select(j, 0, 0)),
            aten.gather(x, 1, j),
            aten.index(x, [i]),
            aten.index(x, [None, i]),
            aten.index(x, [j, j]),
            aten.index(x, [aten.unsqueeze(i, 0), aten.unsqueeze(i, 1)]),
        )

    x, i, j = numbers(6, 7), integers(4, high=6), integers(6, 4, high=6)
    assert_same(
        every, x, i, j, others=[[numbers(8, 9), integers(5, high=8), integers(8, 3, high=8)]]
    )


def test_several_index_tensors_stand_where_pytorch_puts_them():
    def every(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.index(x, [None, i, i]),
            aten.index(x, [i, None, i]),
            aten.index(x, [i, i, i]),
            aten.index(x, [None, i, None, i]),
            aten.index(x, [None, None, i, aten.unsqueeze(i, 1)]),
            aten.index(x, [aten.sub(i, 3)]),
        )

    assert_same(every, numbers(3, 4, 5, 6), integers(7, high=3), dynamic=False)


def test_writes_by_index():
    def every(x: Tensor, i: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.index_put(x, [i], v),
            aten.index_put(x, [None, i], aten.transpose(v, 0, 1)),
            aten.index_put(x, [i, i], aten.select(v, 1, 0)),
            aten.index_put(x, [i], aten.select(v, 0, 0)),
            aten.index_put(x, [i], v, True),
            aten.scatter(x, 0, aten.unsqueeze(i, 1), v),
            aten.scatter(x, 1, aten.unsqueeze(i, 0), 1.5),
        )

    # Places are distinct: the order of writes to one place is not defined.
    i = torch.tensor([2, 0, 3])
    assert_same(every, numbers(5, 5), i, numbers(3, 5, seed=1), dynamic=False)


def test_sums_by_index_count_repeated_places():
    def sums(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
        return aten.index_put(x, [i], v, True)

    assert_same(sums, numbers(5, 4), torch.tensor([1, 1, 4]), numbers(3, 4, seed=1))


def test_values_from_nothing():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.full([x.shape[0], 2], 3, dtype=torch.int64),
            aten.full([2, 3], True, dtype=torch.bool),
            aten.full([], 2.5),
            aten.full([x.shape[1]], float("-inf")),
            aten.arange(0, 5, 2),
            aten.arange(0, x.shape[1], 1, dtype=torch.int32),
            aten.arange(0.0, 1.0, 0.25),
            aten.scalar_tensor(3, dtype=torch.float32) * x,
            aten.scalar_tensor(x.shape[0], dtype=torch.float32),
        )

    assert_same(every, numbers(3, 4), others=[[numbers(2, 6)]])


def test_casts():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        dtypes = (torch.int64, torch.int32, torch.bool, torch.float64, torch.float16, torch.uint8)
        return tuple(aten.to(aten.abs(x), dtype) for dtype in dtypes)

    assert_same(every, numbers(3, 4) * 3)
