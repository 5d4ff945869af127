"""Emitters of arithmetic, comparisons and activations, with the promotion of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.onnx_runs import Calls, assert_same, graph_of, op_types, run_onnx

aten = torch.ops.aten


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, low: int = -9, high: int = 9, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)


def test_unary_functions_of_floats():
    names = ("neg", "abs", "sign", "exp", "sin", "cos", "tanh", "atan", "erf", "sigmoid", "relu")
    names += (
        "silu",
        "mish",
        "hardswish",
        "hardsigmoid",
        "elu",
        "softplus",
        "floor",
        "ceil",
        "round",
    )
    names += ("square", "leaky_relu", "hardtanh", "gelu", "isnan", "reciprocal")

    def every(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(aten, name).default(x) for name in names)

    x = numbers(3, 4) * 2
    x[0, :3] = torch.tensor([0.5, 1.5, -2.5])
    assert_same(every, x, others=[[numbers(2, 7)]])


def test_unary_functions_of_positive_floats():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (aten.log(x), aten.sqrt(x), aten.rsqrt(x), aten.log1p(x), aten.pow(x, 0.3))

    assert_same(every, numbers(3, 4).abs() + 0.1)


def test_functions_of_integers_give_what_pytorch_gives():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        floats = (aten.exp(x), aten.sigmoid(x), aten.sqrt(aten.abs(x)), aten.cos(x))
        same = (
            aten.neg(x),
            aten.abs(x),
            aten.sign(x),
            aten.floor(x),
            aten.round(x),
            aten.square(x),
        )
        return (*floats, *same, aten.isnan(x), aten.pow(x, 2), aten.pow(x, 3), aten.pow(x, 2.0))

    assert_same(every, integers(3, 4, low=-4, high=5))


def test_parametrized_activations():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        return (
            aten.gelu(x, approximate="tanh"),
            aten.softplus(x, 2, 20),
            aten.elu(x, 0.7, 1.3, 1.0),
            aten.elu(x, 0.7, 1.0, 1.2),
            aten.leaky_relu(x, 0.3),
            aten.hardtanh(x, -0.5, 0.25),
            aten.clamp(x, -0.5),
            aten.clamp(x, None, 0.5),
            aten.clamp(x, -0.5, 0.5),
        )

    assert_same(every, numbers(3, 4) * 2)


def test_prelu_has_a_slope_per_channel():
    assert_same(lambda w, x: aten.prelu(x, w), numbers(2, 3, 4), weights=[torch.rand(3)])
    assert_same(lambda w, x: aten.prelu(x, w), numbers(2, 3), weights=[torch.rand(3)])
    assert_same(lambda w, x: aten.prelu(x, w), numbers(2, 3, 4), weights=[torch.rand(1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int32])
def test_operands_of_different_dtypes_are_promoted(dtype: torch.dtype):
    def every(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        sums = (aten.add(x, y), aten.add(y, x), aten.mul(x, y), aten.add(y, 2), aten.add(y, 2.5))
        scaled = (aten.mul(y, 3), aten.rsub(x, 2, 3), aten.sub(x, y, alpha=2), aten.div(y, 4))
        bounds = (aten.maximum(x, y), aten.minimum(y, x), aten.where(y > 0, y, x))
        ordered = (aten.lt(x, y), aten.ge(y, x), aten.eq(y, 1), aten.ne(x, y), aten.le(y, 0.5))
        return (*sums, *scaled, *bounds, *ordered, aten.gt(y, 0))

    y = integers(3, 4, low=0, high=3).to(dtype)
    assert_same(every, numbers(3, 4), y)


def test_booleans_are_added_as_pytorch_does():
    def every(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        both = (aten.add(x, y), aten.mul(x, y), aten.maximum(x, y), aten.minimum(x, y))
        bits = (aten.bitwise_and(x, y), aten.bitwise_or(x, y), aten.bitwise_not(x))
        logic = (aten.logical_and(x, y), aten.logical_or(x, y), aten.logical_not(x))
        return (
            *both,
            *bits,
            *logic,
            aten.lt(x, y),
            aten.eq(x, y),
            aten.ne(x, True),
            aten.add(x, 1),
        )

    assert_same(every, integers(3, 4) > 0, integers(3, 4, seed=1) > 0)


def test_logic_and_bits_of_integers():
    def every(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        bits = (aten.bitwise_and(x, y), aten.bitwise_or(x, y), aten.bitwise_not(x))
        return (*bits, aten.logical_and(x, y), aten.logical_or(x, y), aten.logical_not(x))

    assert_same(every, integers(3, 4), integers(3, 4, seed=1))


def test_division_rounds_as_asked():
    def every(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        modes = tuple(aten.div(x, y, rounding_mode=mode) for mode in (None, "floor", "trunc"))
        return (
            *modes,
            aten.floor_divide(x, y),
            aten.remainder(x, y),
            aten.remainder(x, 3),
            aten.remainder(x, -3),
        )

    y = integers(5, 6, seed=1)
    y[y == 0] = 4
    assert_same(every, integers(5, 6), y)
    assert_same(every, numbers(5, 6) * 5, y + 0.25)


def test_powers():
    def every(x: Tensor) -> tuple[Tensor, ...]:
        exponents = (-1, -0.5, 0.5, 1, 2, 3, 2.5)
        return (*(aten.pow(x, p) for p in exponents), aten.pow(2.0, x), aten.pow(x, x))

    assert_same(every, numbers(3, 4).abs() + 0.5)


def test_masks():
    def every(two: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        low = torch.finfo(torch.float32).min
        return (
            aten.masked_fill(x, mask, float("-inf")),
            aten.masked_fill(x, mask, low),
            aten.masked_fill(x, mask, two),
            aten.where(mask, x, -1.5),
            aten.where(mask, 0.0, x),
            aten.where(mask, 1, x),
        )

    assert_same(every, numbers(3, 4), integers(3, 4) > 0, weights=[torch.tensor(2.0)])


def test_a_size_is_an_operand():
    def function(x: Tensor) -> tuple[Tensor, ...]:
        rows, columns = x.shape
        return (x * rows, x + columns // 2, x < rows - columns, x - (rows * columns + 1) % 5)

    assert_same(function, numbers(3, 4), others=[[numbers(5, 2)], [numbers(2, 9)]])


def test_silu_becomes_what_onnxruntime_fuses():
    graph = graph_of(lambda x: aten.silu(x), numbers(3, 4))
    assert op_types(graph) == ["Sigmoid", "Mul"]


def test_what_nothing_reads_is_not_written():
    graph = graph_of(lambda w, x: x + 1, numbers(3, 4), weights=[torch.ones(2)])
    assert op_types(graph) == ["Add"]


def test_an_input_that_is_an_output_is_passed_on():
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        return x, y, y

    graph = graph_of(function, numbers(3, 4))
    x = numbers(3, 4)
    for got, want in zip(run_onnx(graph, [x]), Calls(function)(x), strict=True):
        assert torch.equal(got, want)
