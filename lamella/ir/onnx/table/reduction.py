"""Reductions along axes."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.table.elementwise import cast
from lamella.ir.onnx.values import Integers, Op, Result, Table, Value

aten = torch.ops.aten

Reduce = Callable[[Builder, Value, list[int], bool], Any]


def reduction(reduce: Reduce) -> Callable[[Builder, Op], Result]:
    """A reduction over the axes of an attribute (before opset 18) or an input."""

    def build(g: Builder, op: Op) -> Result:
        value = op[0]
        given = op.optional(1)
        axes = op.attribute("axes") if given is None else g.numbers(given)
        if not axes:
            if op.attribute("noop_with_empty_axes", 0):
                return value
            axes = range(g.rank(value))
        if isinstance(value, Integers) and op.kind == "ReduceProd":
            return Integers((g.product(value.items),), not op.attribute("keepdims", 1))
        places = sorted(g.axis(value, axis) for axis in axes)
        return reduce(g, value, places, bool(op.attribute("keepdims", 1)))

    return build


def _along(target: Callable[..., Any]) -> Reduce:
    return lambda g, value, axes, keep: g.call(target, value, axes, keep)


def _mean(g: Builder, value: Value, axes: list[int], keep: bool) -> Any:
    return g.call(aten.mean.dim, value, axes, keep)


def _sum(g: Builder, value: Value, axes: list[int], keep: bool) -> Any:
    # PyTorch would widen integers.
    return cast(g, g.call(aten.sum.dim_IntList, value, axes, keep), g.dtype(value))


def _product(g: Builder, value: Value, axes: list[int], keep: bool) -> Any:
    dtype = g.dtype(value)
    for axis in reversed(axes):
        value = g.call(aten.prod.dim_int, value, axis, keep)
    return cast(g, value, dtype)


def _l1(g: Builder, value: Value, axes: list[int], keep: bool) -> Any:
    return _sum(g, g.call(aten.abs.default, value), axes, keep)


def _l2(g: Builder, value: Value, axes: list[int], keep: bool) -> Any:
    return g.call(aten.linalg_vector_norm.default, value, 2, axes, keep)


def _log_sum(g: Builder, value: Value, axes: list[int], keep: bool) -> Any:
    return g.call(aten.log.default, _sum(g, value, axes, keep))


def _log_sum_exp(g: Builder, value: Value, axes: list[int], keep: bool) -> Any:
    peak = g.call(aten.amax.default, value, axes, True)
    shifted = g.call(aten.exp.default, g.call(aten.sub.Tensor, value, peak))
    logarithm = g.call(aten.log.default, _sum(g, shifted, axes, True))
    result = g.call(aten.add.Tensor, logarithm, peak)
    return result if keep else g.call(aten.squeeze.dims, result, axes)


def _sum_square(g: Builder, value: Value, axes: list[int], keep: bool) -> Any:
    return _sum(g, g.call(aten.mul.Tensor, value, value), axes, keep)


def arg_extreme(g: Builder, op: Op) -> Result:
    """The place of the largest or smallest element; of equal ones the first or the last."""
    value = op[0]
    axis, keep = g.axis(value, op.attribute("axis", 0)), bool(op.attribute("keepdims", 1))
    if op.kind == "ArgMin":
        value = g.call(aten.neg.default, value)
    if not op.attribute("select_last_index", 0):
        return g.call(aten.argmax.default, value, axis, keep)
    place = g.call(aten.argmax.default, g.call(aten.flip.default, value, [axis]), axis, keep)
    size = g.static(value, axis)
    op.need(size is not None, "select_last_index along a dynamic axis")
    return g.call(aten.rsub.Scalar, place, (size or 1) - 1)


def cumulative_sum(g: Builder, op: Op) -> Result:
    """Running sums, from either end, with or without the element itself."""
    value, axis = op[0], g.axis(op[0], g.numbers(op[1])[0])
    dtype, backwards = g.dtype(value), bool(op.attribute("reverse", 0))
    if backwards:
        value = g.call(aten.flip.default, value, [axis])
    if op.attribute("exclusive", 0):
        # The first sum is of nothing: move all by one.
        shift = [0, 0] * (g.rank(value) - 1 - axis) + [1, -1]
        value = g.call(aten.constant_pad_nd.default, value, shift, 0)
    summed = cast(g, g.call(aten.cumsum.default, value, axis), dtype)
    return g.call(aten.flip.default, summed, [axis]) if backwards else summed


TABLE: Table = MappingProxyType(
    {
        "ArgMax": arg_extreme,
        "ArgMin": arg_extreme,
        "CumSum": cumulative_sum,
        "ReduceL1": reduction(_l1),
        "ReduceL2": reduction(_l2),
        "ReduceLogSum": reduction(_log_sum),
        "ReduceLogSumExp": reduction(_log_sum_exp),
        "ReduceMax": reduction(_along(aten.amax.default)),
        "ReduceMean": reduction(_mean),
        "ReduceMin": reduction(_along(aten.amin.default)),
        "ReduceProd": reduction(_product),
        "ReduceSum": reduction(_sum),
        "ReduceSumSquare": reduction(_sum_square),
    }
)
"""ONNX operator -> builder."""
