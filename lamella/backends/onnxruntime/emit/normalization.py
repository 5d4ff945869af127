"""Norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter

aten = torch.ops.aten


def layer_norm(e: Emission, call: Call) -> ir.Value:
    """``(x - mean) / sqrt(var + eps) * weight + bias``."""
    return layer_norm_of(e, call, e.tensor(call["input"]))


def layer_norm_of(e: Emission, call: Call, x: ir.Value) -> ir.Value:
    """The norm of `call` of another value; ONNX wants a scale in any case."""
    shape, dtype = [int(size) for size in call["normalized_shape"]], call.out.dtype
    scale = e.optional(call["weight"]) or e.const(np.ones(shape), dtype)
    inputs = (x, scale, e.optional(call["bias"]))
    return e.op("LayerNormalization", *inputs, axis=-len(shape), epsilon=float(call["eps"]))


def rms_norm(e: Emission, call: Call) -> ir.Value:
    """``x / sqrt(mean(x^2) + eps) * weight``."""
    return rms_norm_of(e, call, e.tensor(call["input"]))


def rms_norm_of(e: Emission, call: Call, x: ir.Value) -> ir.Value:
    """The norm of `call` of another value."""
    shape, dtype = [int(size) for size in call["normalized_shape"]], call.out.dtype
    epsilon = torch.finfo(dtype).eps if call["eps"] is None else float(call["eps"])
    scale = e.optional(call["weight"])
    if e.options.opset >= 23:
        scale = scale or e.const(np.ones(shape), dtype)
        return e.op("RMSNormalization", x, scale, axis=-len(shape), epsilon=epsilon)
    axes = e.ints(*range(-len(shape), 0))
    mean = e.op("ReduceMean", e.op("Mul", x, x), axes, keepdims=1)
    root = e.op("Sqrt", e.op("Add", mean, e.const(epsilon, dtype)))
    normed = e.op("Div", x, root)
    return normed if scale is None else e.op("Mul", normed, scale)


def group_norm(e: Emission, call: Call) -> ir.Value:
    """Groups of channels as the instances of an `InstanceNormalization`, which has a kernel."""
    x, dtype, groups = e.tensor(call["input"]), call.out.dtype, int(call["num_groups"])
    ones, zeros = e.const(np.ones(groups), dtype), e.const(np.zeros(groups), dtype)
    grouped = e.op("Reshape", x, e.ints(0, groups, -1))
    normed = e.op("InstanceNormalization", grouped, ones, zeros, epsilon=float(call["eps"]))
    result = e.op("Reshape", normed, e.op("Shape", x))
    per_channel = e.ints(-1, *[1] * (call.out.ndim - 2))
    for name, kind in (("weight", "Mul"), ("bias", "Add")):
        if call[name] is not None:
            result = e.op(kind, result, e.op("Reshape", e.tensor(call[name]), per_channel))
    return result


def batch_norm(e: Emission, call: Call) -> ir.Value:
    """With the running statistics: graphs are captured for inference."""
    dtype, channels = call.out.dtype, int(call.out.shape[1])
    scale = e.optional(call["weight"]) or e.const(np.ones(channels), dtype)
    bias = e.optional(call["bias"]) or e.const(np.zeros(channels), dtype)
    statistics = (e.tensor(call["running_mean"]), e.tensor(call["running_var"]))
    x = e.tensor(call["input"])
    return e.op("BatchNormalization", x, scale, bias, *statistics, epsilon=float(call["eps"]))


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.layer_norm.default: layer_norm,
        aten.rms_norm.default: rms_norm,
        aten.group_norm.default: group_norm,
        aten.batch_norm.default: batch_norm,
    }
)
"""Operator -> emitter."""
