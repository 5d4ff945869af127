"""Sums, means and other reductions, softmax, sorting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.extents import is_fixed
from lamella.errors import BackendError

aten = torch.ops.aten


def axes_of(call: Call) -> list[int]:
    """The reduced axes, counted from the front; none given means all."""
    given, rank = call.arguments.get("dim"), call.fake("self").ndim
    if given is None or given == []:
        return list(range(rank))
    listed: Sequence[int] = given if isinstance(given, list | tuple) else [given]
    return [axis % max(rank, 1) for axis in listed]


def _reduce(e: Emission, call: Call, op_type: str, x: ir.Value) -> ir.Value:
    keep = int(bool(call.arguments.get("keepdim", False)))
    axes = axes_of(call)
    return e.op(op_type, x, e.ints(*axes), keepdims=keep) if axes else x


def _reduction(op_type: str) -> Emitter:
    """A reduction in the dtype of its result."""

    def emit(e: Emission, call: Call) -> ir.Value:
        return _reduce(e, call, op_type, e.tensor(call["self"], call.out.dtype))

    return emit


def _quantifier(op_type: str) -> Emitter:
    """Whether any or all entries are true."""

    def emit(e: Emission, call: Call) -> ir.Value:
        truth = e.cast(e.tensor(call["self"], torch.bool), torch.bool, torch.int32)
        return e.cast(_reduce(e, call, op_type, truth), torch.int32, torch.bool)

    return emit


def cumsum(e: Emission, call: Call) -> ir.Value:
    """Running sums."""
    x = e.tensor(call["self"], call.out.dtype)
    return e.op("CumSum", x, e.scalar(call.axis()))


def argmax(e: Emission, call: Call) -> ir.Value:
    """The first place of the largest entry."""
    x, keep = e.tensor(call["self"]), int(bool(call["keepdim"]))
    if call.fake("self").dtype == torch.bool:
        x = e.cast(x, torch.bool, torch.int32)
    if call["dim"] is None:
        flat = e.op("ArgMax", e.op("Reshape", x, e.ints(-1)), axis=0, keepdims=0)
        return e.op("Reshape", flat, e.ints(*[1] * call.out.ndim)) if keep else flat
    return e.op("ArgMax", x, axis=call.axis(), keepdims=keep)


def variance(e: Emission, call: Call) -> ir.Value:
    """Mean square distance from the mean, times ``n / (n - correction)``."""
    dtype, axes = call.out.dtype, axes_of(call)
    x = e.tensor(call["self"], dtype)
    distance = e.op("Sub", x, e.op("ReduceMean", x, e.ints(*axes), keepdims=1))
    squares = e.op("Mul", distance, distance)
    mean = e.op("ReduceMean", squares, e.ints(*axes), keepdims=int(bool(call["keepdim"])))
    correction = 1 if call["correction"] is None else call["correction"]
    if correction == 0:
        return mean
    sizes = [call.fake("self").shape[axis] for axis in axes]
    if all(map(is_fixed, sizes)):
        count = math.prod(map(int, sizes))
        return e.op("Mul", mean, e.const(count / max(count - correction, 0), dtype))
    shape = e.op("Gather", e.op("Shape", x), e.ints(*axes))
    size = e.cast(e.op("ReduceProd", shape, keepdims=0), torch.int64, dtype)
    left = e.op("Max", e.op("Sub", size, e.const(correction, dtype)), e.const(0, dtype))
    return e.op("Mul", mean, e.op("Div", size, left))


def vector_norm(e: Emission, call: Call) -> ir.Value:
    """The norm of order 1, 2, infinity or any other."""
    x, order, dtype = e.tensor(call["self"], call.out.dtype), float(call["ord"]), call.out.dtype
    if order == 2:
        return _reduce(e, call, "ReduceL2", x)
    if order == 1:
        return _reduce(e, call, "ReduceL1", x)
    size = e.op("Abs", x)
    if math.isinf(order):
        return _reduce(e, call, "ReduceMax" if order > 0 else "ReduceMin", size)
    powers = _reduce(e, call, "ReduceSum", e.op("Pow", size, e.const(order, dtype)))
    return e.op("Pow", powers, e.const(1 / order, dtype))


def histogram(e: Emission, call: Call) -> ir.Value:
    """How many entries fall into each of `bins` equal parts of [min, max]; others don't count."""
    bins, low, high = int(call["bins"]), float(call["min"]), float(call["max"])
    if not low < high:
        raise BackendError("histc takes its bounds from the data (min is not below max)")
    x = e.op("Reshape", e.tensor(call["self"], torch.float32), e.ints(-1))
    scaled = e.op("Mul", e.op("Sub", x, e.const(low)), e.const(bins / (high - low)))
    # The upper bound belongs to the last bin.
    place = e.op("Min", e.op("Floor", scaled), e.const(float(bins - 1)))
    inside = e.op("LessOrEqual", x, e.const(high))
    place = e.op("Where", inside, place, e.const(-1.0))
    numbers = e.const(np.arange(bins, dtype=np.float32))
    hits = e.op("Equal", e.op("Unsqueeze", place, e.ints(1)), numbers)
    counts = e.op("ReduceSum", e.cast(hits, torch.bool, torch.float32), e.ints(0), keepdims=0)
    return e.cast(counts, torch.float32, call.out.dtype)


def _softmax(op_type: str) -> Emitter:
    def emit(e: Emission, call: Call) -> ir.Value:
        return e.op(op_type, e.tensor(call["self"], call.out.dtype), axis=call.axis())

    return emit


def topk(e: Emission, call: Call) -> tuple[ir.Value, ...]:
    """The k largest or smallest entries of an axis and their places."""
    inputs = (e.tensor(call["self"]), e.dims([call["k"]]))
    flags = {"largest": int(call["largest"]), "sorted": int(call["sorted"])}
    return e.add("TopK", inputs, {"axis": call.axis(), **flags}, outputs=2)


def sort(e: Emission, call: Call) -> tuple[ir.Value, ...]:
    """All entries of an axis in order; equal ones keep theirs."""
    x, axis = e.tensor(call["self"]), call.axis()
    size = e.op("Shape", x, start=axis, end=axis + 1)
    flags = {"axis": axis, "largest": int(bool(call["descending"])), "sorted": 1}
    return e.add("TopK", (x, size), flags, outputs=2)


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.mean.dim: _reduction("ReduceMean"),
        aten.mean.default: _reduction("ReduceMean"),
        aten.sum.dim_IntList: _reduction("ReduceSum"),
        aten.sum.default: _reduction("ReduceSum"),
        aten.amax.default: _reduction("ReduceMax"),
        aten.amin.default: _reduction("ReduceMin"),
        aten.prod.dim_int: _reduction("ReduceProd"),
        aten.any.dim: _quantifier("ReduceMax"),
        aten.all.dim: _quantifier("ReduceMin"),
        aten.cumsum.default: cumsum,
        aten.argmax.default: argmax,
        aten.var.correction: variance,
        aten.linalg_vector_norm.default: vector_norm,
        aten.histc.default: histogram,
        aten.softmax.int: _softmax("Softmax"),
        aten.log_softmax.int: _softmax("LogSoftmax"),
        aten.topk.default: topk,
        aten.sort.default: sort,
    }
)
"""Operator -> emitter."""
