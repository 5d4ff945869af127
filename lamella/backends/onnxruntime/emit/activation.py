"""Activation functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter

aten = torch.ops.aten
lam = torch.ops.lamella


def _unary(op_type: str, **attributes: float) -> Emitter:
    def emit(e: Emission, call: Call) -> ir.Value:
        return e.op(op_type, e.tensor(call["self"], call.out.dtype), **attributes)

    return emit


def silu(e: Emission, call: Call) -> ir.Value:
    """``x * sigmoid(x)``; ONNX Runtime makes one `QuickGelu` of it."""
    x = e.tensor(call["self"])
    return e.op("Mul", x, e.op("Sigmoid", x))


def gelu(e: Emission, call: Call) -> ir.Value:
    """Exact, or with tanh."""
    return e.op("Gelu", e.tensor(call["self"]), approximate=call["approximate"])


def softplus(e: Emission, call: Call) -> ir.Value:
    """``log(1 + exp(beta x)) / beta``; past the threshold PyTorch returns x, which is the same."""
    x, beta, dtype = e.tensor(call["self"]), call["beta"], call.out.dtype
    if beta == 1:
        return e.op("Softplus", x)
    scale = e.const(beta, dtype)
    return e.op("Div", e.op("Softplus", e.op("Mul", x, scale)), scale)


def elu(e: Emission, call: Call) -> ir.Value:
    """``scale * (x if x > 0 else alpha * (exp(input_scale * x) - 1))``."""
    x, dtype = e.tensor(call["self"]), call.out.dtype
    alpha, scale, input_scale = (float(call[n]) for n in ("alpha", "scale", "input_scale"))
    if input_scale == 1:
        result = e.op("Elu", x, alpha=alpha)
    else:
        negative = e.op("Elu", e.op("Mul", x, e.const(input_scale, dtype)), alpha=alpha)
        result = e.op("Where", e.op("Greater", x, e.const(0, dtype)), x, negative)
    return result if scale == 1 else e.op("Mul", result, e.const(scale, dtype))


def leaky_relu(e: Emission, call: Call) -> ir.Value:
    """A slope below zero."""
    return e.op("LeakyRelu", e.tensor(call["self"]), alpha=float(call["negative_slope"]))


def hardtanh(e: Emission, call: Call) -> ir.Value:
    """A clamp."""
    dtype = call.out.dtype
    bounds = (e.const(call["min_val"], dtype), e.const(call["max_val"], dtype))
    return e.op("Clip", e.tensor(call["self"]), *bounds)


def prelu(e: Emission, call: Call) -> ir.Value:
    """A slope per channel (axis 1), or one for all."""
    slope, rank = e.tensor(call["weight"]), call.out.ndim
    if rank > 2 and call.fake("weight").numel() != 1:
        slope = e.op("Reshape", slope, e.ints(-1, *[1] * (rank - 2)))
    return e.op("PRelu", e.tensor(call["self"]), slope)


def round_uniform(e: Emission, call: Call) -> ir.Value:
    """Written out: ONNX has no codes of three, five or six bits."""
    x, scale, zero = (e.tensor(call[name]) for name in ("input", "scale", "zero"))
    dtype = call.out.dtype
    codes = e.op("Add", e.op("Round", e.op("Div", x, scale)), zero)
    codes = e.op("Clip", codes, e.const(0, dtype), e.const((1 << call["bits"]) - 1, dtype))
    return e.op("Mul", e.op("Sub", codes, zero), scale)


def round_log(e: Emission, call: Call) -> ir.Value:
    """Powers of the root of two by logarithm and exponential; a zero has an infinite code."""
    x, scale, dtype = e.tensor(call["input"]), e.tensor(call["scale"]), call.out.dtype
    codes = e.op("Mul", e.op("Log", e.op("Div", x, scale)), e.const(-2 / math.log(2), dtype))
    codes = e.op("Clip", e.op("Round", codes), e.const(0, dtype), None)
    powers = e.op("Exp", e.op("Mul", codes, e.const(-math.log(2) / 2, dtype)))
    inside = e.op("Less", codes, e.const((1 << call["bits"]) - 1, dtype))
    return e.op("Where", inside, e.op("Mul", powers, scale), e.const(0, dtype))


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.tanh.default: _unary("Tanh"),
        aten.sigmoid.default: _unary("Sigmoid"),
        aten.relu.default: _unary("Relu"),
        aten.mish.default: _unary("Mish"),
        aten.hardswish.default: _unary("HardSwish"),
        aten.hardsigmoid.default: _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
        aten.silu.default: silu,
        aten.gelu.default: gelu,
        aten.softplus.default: softplus,
        aten.elu.default: elu,
        aten.leaky_relu.default: leaky_relu,
        aten.hardtanh.default: hardtanh,
        aten.prelu.default: prelu,
        lam.round_uniform.default: round_uniform,
        lam.round_log.default: round_log,
    }
)
"""Operator -> emitter."""
