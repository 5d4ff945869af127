"""Weights of 2, 4 or 8 bits, as the kernels of ONNX Runtime take them.

Products of integers have *signed* weights and *unsigned* activations: on x86 that is the pair
with a fast kernel (measured: signed activations take ten times as long, unsigned weights twice).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.emit import dequantized
from lamella.ir.operators import SMALLEST_STEP

lam = torch.ops.lamella

INT8_ACTIVATIONS = 4
"""`accuracy_level` of the kernels that round activations to 8 bits; 0 keeps them."""


def linear_nbits(e: Emission, call: Call) -> ir.Value:
    """`MatMulNBits`, whose packed layout is ours.

    Scales stored as float16 are cast where the model computes in float32; ONNX Runtime folds
    the cast when it loads the model, so that the file is smaller and the kernel is the same.
    """
    if not e.options.contrib:
        return dequantized.linear(e, call)
    x, dtype = call.fake("input"), call.out.dtype
    return e.contrib(
        "MatMulNBits",
        e.tensor(call["input"]),
        e.tensor(call["packed"]),
        e.tensor(call["scales"], dtype),
        e.optional(call["zero_points"]),
        None,
        e.optional(call["bias"], dtype),
        K=int(x.shape[-1]),
        N=int(call.fake("packed").shape[0]),
        bits=int(call["bits"]),
        block_size=int(call["block"]),
        accuracy_level=INT8_ACTIVATIONS if call["int8_activations"] else 0,
    )


def linear_int8(e: Emission, call: Call) -> ir.Value:
    """Rounded activations, which layers on one input share, and `MatMulIntegerToFloat`.

    Without the operators of ONNX Runtime it is `MatMulInteger` and products; with one scale for
    all rows ONNX Runtime turns them into the same when it loads the model.
    """
    per_row = bool(call["per_row"])
    codes, step, zero = (_rounded_rows if per_row else _rounded_tensor)(e, call)
    matrix, scales = _integers(e, call["weight"]), e.tensor(call["scales"])
    bias = e.optional(call["bias"], torch.float32)
    if e.options.contrib:
        factor, added = (e.const(1.0), None) if per_row else (step, bias)
        inputs = (codes, matrix, factor, scales, zero, None, added)
        result = e.contrib("MatMulIntegerToFloat", *inputs)
    else:
        total = e.op("Cast", e.op("MatMulInteger", codes, matrix, zero), to=ir.DataType.FLOAT)
        factor = scales if per_row else e.op("Mul", step, scales)
        result, added = e.op("Mul", total, factor), None
    result = e.op("Mul", result, step) if per_row else result
    if bias is not None and added is None:
        result = e.op("Add", result, bias)
    return e.cast(result, torch.float32, call.out.dtype)


Rounded = tuple[ir.Value, ir.Value, ir.Value]


def _rounded_tensor(e: Emission, call: Call) -> Rounded:
    """Codes, scale and zero of a whole input."""
    source, parts = call["input"], ("codes", "step", "zero")
    if (source, parts[0]) not in e.views:
        inputs = (e.tensor(source, torch.float32),)
        found = e.add("DynamicQuantizeLinear", inputs, {}, outputs=3)
        e.views |= {(source, part): value for part, value in zip(parts, found, strict=True)}
    codes, step, zero = (e.views[source, part] for part in parts)
    return codes, step, zero


def _rounded_rows(e: Emission, call: Call) -> Rounded:
    """Codes with 128 for zero, and a scale for each row; rows are quantized as an axis."""
    source, zero = call["input"], e.const(128, torch.uint8)
    if (source, "row codes") not in e.views:
        x, rank = e.tensor(source, torch.float32), call.fake("input").ndim
        largest = e.op("ReduceMax", e.op("Abs", x), e.ints(-1), keepdims=1)
        step = e.op("Max", e.op("Div", largest, e.const(127.0)), e.const(SMALLEST_STEP))
        # Computed from sizes alone, it is the same for all layers, and ONNX Runtime sees that.
        sizes = [e.size(source, axis) for axis in range(rank)]
        count = e.ints(1)
        if rank > 1:
            count = e.op("ReduceProd", e.op("Concat", *sizes[:-1], axis=0), keepdims=1)
        zeros = e.op("Expand", zero, count)
        rows = x if rank == 2 else e.op("Reshape", x, e.op("Concat", count, sizes[-1], axis=0))
        codes = e.op("QuantizeLinear", rows, e.op("Reshape", step, e.ints(-1)), zeros, axis=0)
        if rank != 2:
            codes = e.op("Reshape", codes, e.op("Concat", *sizes, axis=0))
        e.views |= {(source, "row codes"): codes, (source, "row step"): step}
    return e.views[source, "row codes"], e.views[source, "row step"], zero


def _integers(e: Emission, weight: Node) -> ir.Value:
    """The matrix as ``[in, out]``, which is how it is stored unless something else reads it."""
    if (weight, "transposed") not in e.views:
        e.views[weight, "transposed"] = e.op("Transpose", e.tensor(weight), perm=[1, 0])
    return e.views[weight, "transposed"]


def embedding_nbits(e: Emission, call: Call) -> ir.Value:
    """`GatherBlockQuantized`, which reads only the rows that are asked for."""
    if not e.options.contrib:
        return dequantized.embedding(e, call)
    packed, block = call.fake("packed"), int(call["block"])
    rows, blocks, width = (int(size) for size in packed.shape)
    found = e.contrib(
        "GatherBlockQuantized",
        _flat_rows(e, call["packed"], rows, blocks * width),
        e.tensor(call["indices"]),
        e.tensor(call["scales"]),
        e.optional(call["zero_points"]),
        gather_axis=0,
        quantize_axis=1,
        block_size=block,
        bits=int(call["bits"]),
    )
    features = int(call["features"])
    if features == blocks * block:
        return found
    return e.op("Slice", found, e.ints(0), e.ints(features), e.ints(call.out.ndim - 1))


def _flat_rows(e: Emission, packed: Node, rows: int, width: int) -> ir.Value:
    """The codes as one row of bytes per row of the table; a tied head reads the same bytes."""
    key = (packed, "flat rows")
    if key not in e.views:
        e.views[key] = e.op("Reshape", e.tensor(packed), e.ints(rows, width))
    return e.views[key]


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        lam.linear_nbits.default: linear_nbits,
        lam.linear_int8.default: linear_int8,
        lam.embedding_nbits.default: embedding_nbits,
    }
)
"""Operator -> emitter."""
