"""Products of 8-bit integers with static ranges.

Convolutions are written as QDQ, which ONNX Runtime turns into `QLinearConv` when it loads the
model; `ConvInteger` takes six times as long as a convolution of floats (measured), so that an
output without a range of its own is of no use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.weights import stored
from lamella.errors import BackendError
from lamella.ir.integer_operators import integer_bias

lam = torch.ops.lamella


def linear_int8_static(e: Emission, call: Call) -> ir.Value:
    """`MatMulIntegerToFloat` of codes that layers on one input share; QDQ in standard ONNX."""
    codes, step, zero = _codes(e, call["input"], float(call["step"]), int(call["zero"]))
    matrix, scales = _matrix(e, call["weight"]), e.tensor(call["scales"])
    bias = e.optional(call["bias"], torch.float32)
    if e.options.contrib:
        inputs = (codes, matrix, step, scales, zero, None, bias)
        result = e.contrib("MatMulIntegerToFloat", *inputs)
    else:
        dense = e.op("DequantizeLinear", matrix, scales, axis=1)
        result = e.op("MatMul", e.op("DequantizeLinear", codes, step, zero), dense)
        result = result if bias is None else e.op("Add", result, bias)
    return e.cast(result, torch.float32, call.out.dtype)


def conv_int8(e: Emission, call: Call) -> ir.Value:
    """A convolution between `DequantizeLinear` and `QuantizeLinear`."""
    codes, step, zero = _codes(e, call["input"], float(call["step"]), int(call["zero"]))
    out_step, out_zero = float(call["out_step"]), int(call["out_zero"])
    weight = e.op("DequantizeLinear", e.tensor(call["weight"]), e.tensor(call["scales"]), axis=0)
    padding = [int(size) for size in call["padding"]]
    product = e.op(
        "Conv",
        e.op("DequantizeLinear", codes, step, zero),
        weight,
        None if call["bias"] is None else _bias(e, call),
        strides=[int(size) for size in call["stride"]],
        pads=padding * 2,
        dilations=[int(size) for size in call["dilation"]],
        group=int(call["groups"]),
    )
    ends = (e.const(out_step), e.const(out_zero, torch.uint8))
    rounded = e.op("QuantizeLinear", product, *ends)
    # A convolution behind this one has the same range for its input.
    e.views[call.node, f"codes {out_step} {out_zero}"] = rounded
    result = e.op("DequantizeLinear", rounded, *ends)
    return e.cast(result, torch.float32, call.out.dtype)


def _codes(e: Emission, source: Node, step: float, zero: int) -> tuple[ir.Value, ...]:
    """Codes, step and zero of an input; its readers of the same range share them."""
    numbers = e.const(step), e.const(zero, torch.uint8)
    key = (source, f"codes {step} {zero}")
    if key not in e.views:
        e.views[key] = e.op("QuantizeLinear", e.tensor(source, torch.float32), *numbers)
    return (e.views[key], *numbers)


def _matrix(e: Emission, weight: Node) -> ir.Value:
    """The matrix as ``[in, out]``, which is how it is stored unless something else reads it."""
    if (weight, "transposed") not in e.views:
        e.views[weight, "transposed"] = e.op("Transpose", e.tensor(weight), perm=[1, 0])
    return e.views[weight, "transposed"]


def _bias(e: Emission, call: Call) -> ir.Value:
    """The bias in units of the products, as integers with their scale."""
    bias, scales, step = call["bias"], call["scales"], torch.tensor(float(call["step"]))
    if bias.op != "get_attr" or scales.op != "get_attr":
        raise BackendError("the bias of a convolution of integers must be a weight")

    def factors() -> Tensor:
        return step * e.graph.weight(scales)

    def integers() -> Tensor:
        return integer_bias(e.graph.weight(bias), factors())

    shape, name = (int(bias.meta["val"].shape[0]),), str(bias.target)
    whole = stored(e, f"{name}.integers", integers, shape, torch.int32)
    unit = stored(e, f"{name}.unit", factors, shape, torch.float32)
    return e.op("DequantizeLinear", whole, unit, axis=0)


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        lam.linear_int8_static.default: linear_int8_static,
        lam.conv_int8.default: conv_int8,
    }
)
"""Operator -> emitter."""
