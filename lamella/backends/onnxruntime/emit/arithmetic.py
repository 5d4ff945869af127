"""Arithmetic element by element, with the promotion of dtypes that PyTorch does silently."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.types import promoted

aten = torch.ops.aten

_ON_BOOLEANS = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}


def held(operand: Any) -> Any:
    """What promotes as an operand does: its fake value, or the number itself."""
    return operand.meta["val"] if isinstance(operand, Node) else operand


def _binary(op_type: str) -> Emitter:
    def emit(e: Emission, call: Call) -> ir.Value:
        dtype = call.out.dtype
        left, right = e.tensor(call["self"], dtype), e.tensor(call["other"], dtype)
        alpha = call.arguments.get("alpha", 1)
        if alpha != 1:
            right = e.op("Mul", right, e.tensor(alpha, dtype))
        return e.op(_ON_BOOLEANS[op_type] if dtype == torch.bool else op_type, left, right)

    return emit


def reversed_sub(e: Emission, call: Call) -> ir.Value:
    """``other - alpha * self``."""
    dtype = call.out.dtype
    taken = e.tensor(call["self"], dtype)
    if call["alpha"] != 1:
        taken = e.op("Mul", taken, e.tensor(call["alpha"], dtype))
    return e.op("Sub", e.tensor(call["other"], dtype), taken)


def divide(e: Emission, call: Call) -> ir.Value:
    """Division with a rounding mode: None (true), "floor" or "trunc"."""
    dtype = call.out.dtype
    left, right = e.tensor(call["self"], dtype), e.tensor(call["other"], dtype)
    mode = call.arguments.get("rounding_mode")
    if call.node.target is aten.floor_divide.default:
        mode = "floor"
    if mode == "floor" and not dtype.is_floating_point:
        # Div of ONNX rounds integers towards zero.
        left = e.op("Sub", left, e.op("Mod", left, right))
    quotient = e.op("Div", left, right)
    if mode is None or not dtype.is_floating_point:
        return quotient
    if mode == "floor":
        return e.op("Floor", quotient)
    return e.op("Mul", e.op("Sign", quotient), e.op("Floor", e.op("Abs", quotient)))


def remainder(e: Emission, call: Call) -> ir.Value:
    """The remainder with the sign of the divisor."""
    dtype = call.out.dtype
    left, right = e.tensor(call["self"], dtype), e.tensor(call["other"], dtype)
    if not dtype.is_floating_point:
        return e.op("Mod", left, right)
    floor = e.op("Floor", e.op("Div", left, right))
    return e.op("Sub", left, e.op("Mul", floor, right))


def power(e: Emission, call: Call) -> ir.Value:
    """A tensor to a number; the usual exponents without `Pow`."""
    x, exponent = e.tensor(call["self"], call.out.dtype), call["exponent"]
    if exponent == 1:
        return x
    if exponent == 2:
        return e.op("Mul", x, x)
    if exponent == 0.5:
        return e.op("Sqrt", x)
    if exponent == -0.5:
        return e.op("Reciprocal", e.op("Sqrt", x))
    if exponent == -1 and call.out.dtype.is_floating_point:
        return e.op("Reciprocal", x)
    return e.op("Pow", x, e.tensor(exponent, call.out.dtype))


def power_of_tensor(e: Emission, call: Call) -> ir.Value:
    """A number or a tensor to a tensor."""
    dtype = call.out.dtype
    return e.op("Pow", e.tensor(call["self"], dtype), e.tensor(call["exponent"], dtype))


def clamp(e: Emission, call: Call) -> ir.Value:
    """Bounds that may be None."""
    dtype = call.out.dtype
    bounds = (e.optional(call["min"], dtype), e.optional(call["max"], dtype))
    return e.op("Clip", e.tensor(call["self"], dtype), *bounds)


def _unary(op_type: str) -> Emitter:
    """An operator whose result is floating point, or of the dtype of its input."""

    def emit(e: Emission, call: Call) -> ir.Value:
        return e.op(op_type, e.tensor(call["self"], call.out.dtype))

    return emit


def _rounding(op_type: str) -> Emitter:
    """Rounding leaves integers alone."""

    def emit(e: Emission, call: Call) -> ir.Value:
        x = e.tensor(call["self"])
        return e.op(op_type, x) if call.out.dtype.is_floating_point else x

    return emit


def rsqrt(e: Emission, call: Call) -> ir.Value:
    """One over the square root."""
    return e.op("Reciprocal", e.op("Sqrt", e.tensor(call["self"], call.out.dtype)))


def square(e: Emission, call: Call) -> ir.Value:
    """The product with itself."""
    x = e.tensor(call["self"])
    return e.op("Mul", x, x)


def log1p(e: Emission, call: Call) -> ir.Value:
    """``log(1 + x)``; small x lose digits in the sum, as far as the dtype rounds."""
    dtype = call.out.dtype
    return e.op("Log", e.op("Add", e.tensor(call["self"], dtype), e.const(1, dtype)))


def where(e: Emission, call: Call) -> ir.Value:
    """A choice element by element; either side may be a number."""
    dtype = call.out.dtype
    condition = e.tensor(call["condition"], torch.bool)
    return e.op("Where", condition, e.tensor(call["self"], dtype), e.tensor(call["other"], dtype))


def masked_fill(e: Emission, call: Call) -> ir.Value:
    """A number, or a tensor without axes, where the mask is true."""
    dtype = call.out.dtype
    value = call["value"]
    if isinstance(value, float) and math.isinf(value) and not dtype.is_floating_point:
        raise ValueError(f"{dtype} can't hold {value}")
    mask = e.tensor(call["mask"], torch.bool)
    return e.op("Where", mask, e.tensor(value, dtype), e.tensor(call["self"], dtype))


def wide(left: Any, right: Any) -> torch.dtype:
    """The dtype in which two operands are compared."""
    return promoted(held(left), held(right))


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.add.Tensor: _binary("Add"),
        aten.sub.Tensor: _binary("Sub"),
        aten.mul.Tensor: _binary("Mul"),
        aten.maximum.default: _binary("Max"),
        aten.minimum.default: _binary("Min"),
        aten.rsub.Scalar: reversed_sub,
        aten.div.Tensor: divide,
        aten.div.Tensor_mode: divide,
        aten.floor_divide.default: divide,
        aten.remainder.Scalar: remainder,
        aten.remainder.Tensor: remainder,
        aten.pow.Tensor_Scalar: power,
        aten.pow.Scalar: power_of_tensor,
        aten.pow.Tensor_Tensor: power_of_tensor,
        aten.clamp.default: clamp,
        aten.neg.default: _unary("Neg"),
        aten.abs.default: _unary("Abs"),
        aten.sign.default: _unary("Sign"),
        aten.exp.default: _unary("Exp"),
        aten.log.default: _unary("Log"),
        aten.sqrt.default: _unary("Sqrt"),
        aten.reciprocal.default: _unary("Reciprocal"),
        aten.erf.default: _unary("Erf"),
        aten.sin.default: _unary("Sin"),
        aten.cos.default: _unary("Cos"),
        aten.atan.default: _unary("Atan"),
        aten.floor.default: _rounding("Floor"),
        aten.ceil.default: _rounding("Ceil"),
        aten.round.default: _rounding("Round"),
        aten.rsqrt.default: rsqrt,
        aten.square.default: square,
        aten.log1p.default: log1p,
        aten.where.self: where,
        aten.where.ScalarOther: where,
        aten.where.ScalarSelf: where,
        aten.masked_fill.Scalar: masked_fill,
        aten.masked_fill.Tensor: masked_fill,
    }
)
"""Operator -> emitter."""
