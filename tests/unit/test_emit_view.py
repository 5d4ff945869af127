"""Emitters of views: sizes stay symbolic, and constant where they can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamella.backends.onnxruntime.writer import write_onnx
from tests.unit.onnx_runs import assert_same, graph_of, op_types

aten = torch.ops.aten


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def constants_of(function: Any, *inputs: Tensor) -> list[list[int]]:
    """The integer constants that the written model holds."""
    model = write_onnx(graph_of(function, *inputs))
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return [t.numpy().tolist() for t in tensors if t is not None and t.dtype.name == "INT64"]


def test_a_reshape_that_keeps_its_leading_axes_has_a_constant_target():
    def heads(x: Tensor) -> Tensor:
        return aten.reshape(x, [x.shape[0], x.shape[1], 4, 2])

    assert op_types(graph_of(heads, numbers(2, 5, 8))) == ["Reshape"]
    assert constants_of(heads, numbers(2, 5, 8)) == [[0, 0, 4, 2]]
    assert_same(heads, numbers(2, 5, 8), others=[[numbers(3, 4, 8)]])


def test_a_reshape_that_joins_axes_leaves_one_to_the_rest():
    def joined(x: Tensor) -> Tensor:
        return aten.reshape(x, [x.shape[0] * x.shape[1], 8])

    assert constants_of(joined, numbers(2, 5, 8)) == [[-1, 8]]
    assert_same(joined, numbers(2, 5, 8), others=[[numbers(3, 4, 8)]])


def test_a_reshape_with_two_open_sizes_computes_them():
    def moved(x: Tensor) -> Tensor:
        turned = aten.transpose(x, 0, 1)
        return aten.reshape(turned, [2, x.shape[1] // 2, x.shape[0], 8])

    def split(x: Tensor) -> Tensor:
        return aten.reshape(x, [x.shape[1], -1, x.shape[0]])

    assert_same(moved, numbers(3, 6, 8), others=[[numbers(2, 4, 8)]])
    assert_same(split, numbers(3, 6, 8), others=[[numbers(2, 4, 8)]])


def test_axes_change_places():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.transpose(x, -1, 0),
            aten.permute(x, [1, -1, 0]),
            aten.unsqueeze(x, -1),
            aten.unsqueeze(x, 1),
            aten.squeeze(aten.unsqueeze(x, 1), 1),
            aten.squeeze(aten.unsqueeze(x, 1), [1, 2]),
            aten.flip(x, [0, -1]),
            aten.clone(x) + 1,
        )

    assert_same(every, numbers(3, 4, 5), others=[[numbers(2, 7, 3)]])


def test_an_expand_keeps_what_it_does_not_name():
    def every(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        rows, columns = y.shape
        return (
            aten.expand(x, [rows, columns]) + 0,
            aten.expand(x, [4, -1, columns]) + 0,
            aten.expand(x, [rows, columns, rows, columns]) * 2,
        )

    x, y = numbers(3, 1), numbers(3, 5)
    graph = graph_of(every, x, y)
    assert "Expand" in op_types(graph)
    assert_same(every, x, y, others=[[numbers(2, 1), numbers(2, 9)]])


def test_slices_and_selections():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        length = x.shape[1]
        return (
            aten.slice(x, 1, 1, 3),
            aten.slice(x, 1, -2, 2**63 - 1),
            aten.slice(x, 1, 0, -1),
            aten.slice(x, 1, 0, 2**63 - 1, 2),
            aten.slice(x, 1, length // 2, length),
            aten.slice(x, 0, None, None) + 1,
            aten.select(x, 1, -1),
            aten.select(x, 0, 1),
            aten.select(x, 1, length - 2),
        )

    assert_same(every, numbers(3, 6), others=[[numbers(2, 9)]])


def test_concatenation_and_splitting():
    def every(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        parts = aten.split_with_sizes(x, [1, x.shape[1] - 1], 1)
        whole = aten.split_with_sizes(y, [2, 2], -1)
        return (
            aten.cat([x, y], -1),
            aten.stack([y, y * 2], 1),
            aten.cat([y, aten.unsqueeze(aten.arange(0, y.shape[0], 1), 1)], 1),
            *parts,
            *whole,
        )

    assert_same(every, numbers(3, 6), numbers(3, 4), others=[[numbers(5, 9), numbers(5, 4)]])


def test_repeats():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.repeat(x, [2, 3]),
            aten.repeat(x, [2, 1, x.shape[1]]),
            aten.repeat_interleave(x, 3, 1),
            aten.repeat_interleave(x, 2, 0),
            aten.repeat_interleave(x, 2),
        )

    assert_same(every, numbers(3, 4), others=[[numbers(2, 5)]])


def test_rolls():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.roll(x, [1], [1]),
            aten.roll(x, [-2, 1], [0, -1]),
            aten.roll(x, [7], [1]),
            aten.roll(x, [2]),
            aten.roll(x, [0], [0]) + 1,
        )

    assert_same(every, numbers(3, 4), others=[[numbers(2, 5)]])


def test_triangles_of_numbers_and_of_truths():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        flags = aten.gt(x, 0)
        return (aten.tril(x, 1), aten.triu(x, -1), aten.tril(flags, 0), aten.triu(flags, 1))

    assert_same(every, numbers(4, 4), others=[[numbers(3, 6)]])


def test_pads_in_every_mode():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.pad(x, [1, 2], "constant", 3.0),
            aten.pad(x, [1, 2, 0, 1], "constant"),
            aten.pad(x, [-1, 2], "constant"),
            aten.pad(x, [1, 2], "reflect"),
            aten.pad(x, [1, 2], "replicate"),
            aten.pad(x, [2, 1], "circular"),
            aten.constant_pad_nd(x, [0, 0, 1, 0], 1.5),
            aten.pad(x, [0, x.shape[1] % 4], "constant", 0.5),
            aten.pad(aten.gt(x, 0), [1, 0], "constant", 1.0),
        )

    assert_same(every, numbers(2, 3, 6), others=[[numbers(3, 3, 7)]])


def test_pixel_shuffle():
    assert_same(lambda x: aten.pixel_shuffle(x, 2), numbers(2, 8, 3, 4))


def test_sizes_by_arithmetic():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        rows, columns = x.shape
        sizes = (rows + columns, rows * 2, columns // 2, -(-columns // 4), columns % 3 + 1)
        larger = torch.sym_max(rows, columns)
        return (
            *(aten.full([size, 2], 1.5) for size in sizes),
            aten.full([torch.sym_min(rows, columns)], 2),
            aten.arange(0, larger, 1),
            aten.arange(1, larger, 2, dtype=torch.float32),
        )

    assert_same(every, numbers(3, 7), others=[[numbers(5, 2)], [numbers(2, 9)]])


def test_a_size_is_an_output():
    def sizes(x: Tensor) -> Any:
        return x.shape[0] + 1, x * 2

    graph = graph_of(sizes, numbers(3, 4))
    model = write_onnx(graph)
    assert [str(value.dtype) for value in model.graph.outputs] == ["INT64", "FLOAT"]
