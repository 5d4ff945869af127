"""Products of matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.weights import stored

aten = torch.ops.aten
lam = torch.ops.lamella


def linear(e: Emission, call: Call) -> ir.Value:
    """``input @ weight.T + bias``; ONNX Runtime packs the constant matrix either way."""
    x, weight = e.tensor(call["input"]), call["weight"]
    transposed = e.views.get((weight, "transposed"))
    if transposed is not None:
        product = e.op("MatMul", x, transposed)
    elif weight.op == "get_attr" and e.options.contrib:
        # A weight that something else reads as well, such as a tied embedding.
        product = e.contrib("FusedMatMul", x, e.tensor(weight), transB=1)
    else:
        product = e.op("MatMul", x, e.op("Transpose", e.tensor(weight), perm=[1, 0]))
    bias = e.optional(call["bias"])
    return product if bias is None else e.op("Add", product, bias)


def matmul(e: Emission, call: Call) -> ir.Value:
    """A product with broadcast batches."""
    return e.op("MatMul", e.tensor(call["self"]), e.tensor(call["other"]))


def einsum(e: Emission, call: Call) -> ir.Value:
    """A sum of products by equation."""
    tensors = [e.tensor(operand) for operand in call["tensors"]]
    return e.op("Einsum", *tensors, equation=call["equation"].replace(" ", ""))


def grouped_linear(e: Emission, call: Call) -> ir.Value:
    """The rows of each expert, cut out and multiplied by its matrix."""
    x, weight = e.tensor(call["input"]), call["weight"]
    experts, width = (int(size) for size in call.fake("weight").shape[:2])
    offsets = e.tensor(call["offsets"], torch.int64)
    cuts = e.add("Split", (offsets,), {"axis": 0, "num_outputs": experts}, outputs=experts)
    start, parts = e.ints(0), list[ir.Value]()
    for expert, stop in enumerate(cuts):
        rows = e.op("Slice", x, start, stop, e.ints(0))
        parts.append(e.op("MatMul", rows, _matrix_of(e, weight, expert)))
        start = stop
    # Rows past the last offset belong to no expert and are zero.
    left = e.op("Sub", e.op("Shape", x, start=0, end=1), start)
    zeros = e.op("ConstantOfShape", e.op("Concat", left, e.ints(width), axis=0))
    parts.append(e.cast(zeros, torch.float32, call.out.dtype))
    return e.op("Concat", *parts, axis=0)


def _matrix_of(e: Emission, weight: Node, expert: int) -> ir.Value:
    """The matrix of one expert as ``[in, out]``."""
    if weight.op != "get_attr":
        matrix = e.op("Gather", e.tensor(weight), e.scalar(expert), axis=0)
        return e.op("Transpose", matrix, perm=[1, 0])
    key = (weight, f"expert {expert}")
    if key not in e.views:
        held = weight.meta["val"]
        shape = (int(held.shape[2]), int(held.shape[1]))
        name = f"{weight.target}.{expert}"
        read = lambda: e.graph.weight(weight)[expert].t()  # noqa: E731
        e.views[key] = stored(e, name, read, shape, held.dtype)
    return e.views[key]


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.linear.default: linear,
        aten.matmul.default: matmul,
        aten.einsum.default: einsum,
        lam.grouped_linear.default: grouped_linear,
    }
)
"""Operator -> emitter."""
