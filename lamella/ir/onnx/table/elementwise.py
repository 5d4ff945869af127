"""Elementwise operators: arithmetic, comparisons, logic, activations, casts."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.tensors import dtype_of
from lamella.ir.onnx.values import Constant, Handler, Integer, Integers, Op, Result, Table, Value

aten = torch.ops.aten
Target = Callable[..., Any]


def unary(target: Target, **fixed: Any) -> Handler:
    """An operator of one tensor."""
    return lambda g, op: g.call(target, op[0], **fixed)


def keep(g: Builder, op: Op) -> Result:
    """The input itself."""
    return op[0]


# ---- two operands ---------------------------------------------------------------------------


def as_scalar(g: Builder, value: Value, beside: Value) -> Any:
    """`value` as a Python number if that changes neither shape nor type beside `beside`."""
    if (
        isinstance(value, Node)
        or g.rank(value) > g.rank(beside)
        or g.dtype(value) != g.dtype(beside)
    ):
        return None
    if g.dtype(value) is torch.bool:
        return None
    return g.number(value)


def binary(g: Builder, target: Target, first: Value, second: Value) -> Any:
    """``target(first, second)``, with a constant number as a scalar where ATen takes one."""
    if not isinstance(first, Node) and not isinstance(second, Node):
        return g.call(target, first, second)
    scalar = as_scalar(g, second, first)
    return g.call(target, first, second if scalar is None else scalar)


def integer_pairs(g: Builder, *values: Value) -> list[tuple[Integer, ...]] | None:
    """The elements of integer vectors side by side, if one of them comes from shapes.

    Sizes that were cast to floats count too, beside constants that are whole numbers.
    """
    found = [value for value in values if isinstance(value, Integers)]
    if not found:
        return None
    whole = any(value.dtype.is_floating_point for value in found)
    lists = [g.as_integers(value, whole) for value in values]
    known = [found for found in lists if found is not None]
    if len(known) < len(lists):
        return None
    length = max(len(found.items) for found in known)
    if any(len(found.items) not in (1, length) for found in known):
        return None
    spread = [f.items * (length if len(f.items) == 1 else 1) for f in known]
    return list(zip(*spread, strict=True))


def like_integers(g: Builder, items: list[Integer], *values: Value) -> Integers:
    """Computed elements as integers of the rank that broadcasting gives."""
    scalar = all(g.rank(value) == 0 for value in values)
    return Integers(tuple(items), scalar, g.dtype(values[0]))


def arithmetic(target: Target, integer: Target, commutes: bool = False) -> Handler:
    """An operator of two operands that also works on integers computed from shapes."""

    def build(g: Builder, op: Op) -> Result:
        first, second = op[0], op[1]
        pairs = integer_pairs(g, first, second)
        if pairs is not None:
            items = [g.integer(integer, *pair) for pair in pairs]
            return like_integers(g, items, first, second)
        if commutes and not isinstance(first, Node) and as_scalar(g, first, second) is not None:
            first, second = second, first
        return binary(g, target, first, second)

    return build


_plain_add = arithmetic(aten.add.Tensor, operator.add, commutes=True)
_plain_subtract = arithmetic(aten.sub.Tensor, operator.sub)


def add(g: Builder, op: Op) -> Result:
    """A sum; a bias added to a linear layer that nothing else reads becomes its bias."""
    for place in (0, 1):
        linear, bias = op[place], op[1 - place]
        if isinstance(linear, Node) and isinstance(bias, Constant) and op.alone[place]:
            biased = _with_bias(g, linear, bias)
            if biased is not None:
                return biased
    return _plain_add(g, op)


def _with_bias(g: Builder, linear: Node, bias: Constant) -> Node | None:
    if linear.target is not aten.linear.default or len(linear.args) > 2:
        return None
    features = linear.meta["val"].shape[-1]
    if (
        bias.tensor.ndim == 0
        or bias.tensor.numel() != features
        or bias.tensor.shape[-1] != features
    ):
        return None
    if bias.tensor.ndim > linear.meta["val"].ndim:
        return None
    flat = g.call(aten.reshape.default, bias, [features]) if bias.tensor.ndim > 1 else bias
    return g.call(aten.linear.default, *linear.args, flat)


def subtract(g: Builder, op: Op) -> Result:
    """A difference."""
    first, second = op[0], op[1]
    if isinstance(second, Node) and not isinstance(first, Node):
        scalar = as_scalar(g, first, second)
        if scalar is not None:
            return g.call(aten.rsub.Scalar, second, scalar)
    return _plain_subtract(g, op)


def divide(g: Builder, op: Op) -> Result:
    """A quotient; of integers it is cut towards zero."""
    first, second = op[0], op[1]
    floating = g.dtype(first).is_floating_point
    pairs = None if floating else integer_pairs(g, first, second)
    if pairs is not None:
        # Sizes are not negative: cutting is flooring.
        items = [
            g.integer(_quotient, *p) if _numbers(p) else g.integer(operator.floordiv, *p)
            for p in pairs
        ]
        return like_integers(g, items, first, second)
    if floating:
        return binary(g, aten.div.Tensor, first, second)
    scalar = as_scalar(g, second, first)
    divisor = second if scalar is None else scalar
    return g.call(aten.div.Tensor_mode, first, divisor, rounding_mode="trunc")


def _numbers(pair: tuple[Integer, ...]) -> bool:
    return all(isinstance(item, int) for item in pair)


def _quotient(first: int, second: int) -> int:
    return abs(first) // abs(second) * (1 if (first < 0) == (second < 0) else -1)


def modulo(g: Builder, op: Op) -> Result:
    """A remainder: with the sign of the divisor, or of the dividend for ``fmod``."""
    first, second = op[0], op[1]
    pairs = integer_pairs(g, first, second)
    if pairs is not None and not op.attribute("fmod", 0):
        return like_integers(g, [g.integer(operator.mod, *p) for p in pairs], first, second)
    if not op.attribute("fmod", 0):
        return _remainder(g, first, second)
    sign = g.call(aten.sign.default, first)
    magnitude = _remainder(g, g.call(aten.abs.default, first), g.call(aten.abs.default, second))
    return g.call(aten.mul.Tensor, sign, magnitude)


def _remainder(g: Builder, first: Value, second: Value) -> Any:
    scalar = as_scalar(g, second, first)
    if scalar is not None:
        return g.call(aten.remainder.Scalar, first, scalar)
    return g.call(aten.remainder.Tensor, first, second)


def power(g: Builder, op: Op) -> Result:
    """A power; the result has the type of the base."""
    base, exponent = op[0], op[1]
    number = g.number(exponent)
    if isinstance(number, int | float) and g.rank(exponent) <= g.rank(base):
        whole = int(number) if float(number).is_integer() else number
        made = g.call(aten.pow.Tensor_Scalar, base, whole)
    elif isinstance(exponent, Node) and as_scalar(g, base, exponent) is not None:
        made = g.call(aten.pow.Scalar, g.number(base), exponent)
    else:
        made = g.call(aten.pow.Tensor_Tensor, base, exponent)
    return cast(g, made, g.dtype(base))


def extreme(target: Target, integer: Target, bound: str) -> Handler:
    """The largest or smallest of any number of operands; beside a number it is a clamp."""

    def build(g: Builder, op: Op) -> Result:
        total = op[0]
        for place in range(1, len(op.inputs)):
            total = _extreme_of(g, (target, integer, bound), total, op[place])
        return total

    return build


def _extreme_of(g: Builder, kind: tuple[Target, Target, str], first: Value, second: Value) -> Value:
    target, integer, bound = kind
    pairs = integer_pairs(g, first, second)
    if pairs is not None:
        return like_integers(g, [g.integer(integer, *p) for p in pairs], first, second)
    if not isinstance(first, Node):
        first, second = second, first
    scalar = as_scalar(g, second, first) if isinstance(first, Node) else None
    if scalar is None:
        return g.call(target, first, second)
    return g.call(aten.clamp.default, first, **{bound: scalar})


def total(g: Builder, op: Op) -> Result:
    """The sum of any number of operands."""
    result = op[0]
    for place in range(1, len(op.inputs)):
        result = binary(g, aten.add.Tensor, result, op[place])
    return result


def average(g: Builder, op: Op) -> Result:
    """The mean of any number of operands."""
    summed = total(g, op)
    return summed if len(op.inputs) == 1 else g.call(aten.div.Tensor, summed, len(op.inputs))


# ---- comparisons and logic ------------------------------------------------------------------

_COMPARE: dict[str, tuple[Target, Target, Target, Target]] = {
    # Type -> of tensors, of a tensor and a number, of a number and a tensor, of integers.
    "Equal": (aten.eq.Tensor, aten.eq.Scalar, aten.eq.Scalar, operator.eq),
    "Less": (aten.lt.Tensor, aten.lt.Scalar, aten.gt.Scalar, operator.lt),
    "LessOrEqual": (aten.le.Tensor, aten.le.Scalar, aten.ge.Scalar, operator.le),
    "Greater": (aten.gt.Tensor, aten.gt.Scalar, aten.lt.Scalar, operator.gt),
    "GreaterOrEqual": (aten.ge.Tensor, aten.ge.Scalar, aten.le.Scalar, operator.ge),
}


def compare(g: Builder, op: Op) -> Result:
    """A comparison; of integers from shapes it is decided now."""
    tensors, number, flipped, integer = _COMPARE[op.kind]
    first, second = op[0], op[1]
    pairs = integer_pairs(g, first, second)
    if pairs is not None:
        decided = torch.tensor([_decide(integer, *pair) for pair in pairs], dtype=torch.bool)
        scalar = g.rank(first) == 0 and g.rank(second) == 0
        return Constant(decided[0] if scalar else decided)
    if isinstance(first, Node) and as_scalar(g, second, first) is not None:
        return g.call(number, first, g.number(second))
    if isinstance(second, Node) and as_scalar(g, first, second) is not None:
        return g.call(flipped, second, g.number(first))
    return g.call(tensors, first, second)


def _decide(relation: Target, first: Integer, second: Integer) -> bool:
    sizes = [item.meta["val"] if isinstance(item, Node) else item for item in (first, second)]
    return bool(relation(*sizes))


def exclusive_or(g: Builder, op: Op) -> Result:
    """Whether two truth values differ."""
    return g.call(aten.ne.Tensor, op[0], op[1])


def choose(g: Builder, op: Op) -> Result:
    """The elements of one tensor or another; of integers if the condition is known."""
    condition, first, second = op[0], op[1], op[2]
    pairs = integer_pairs(g, condition, first, second)
    if pairs is not None and g.is_constant(condition):
        items = [one if flag else other for flag, one, other in pairs]
        return like_integers(g, items, first, condition, second)
    if g.is_constant(condition) and g.rank(condition) <= 1 and not isinstance(first, Node):
        pairs = integer_pairs(g, first, second)
        flags = g.constant(condition).tensor.reshape(-1).tolist()
        if pairs is not None and len(flags) in (1, len(pairs)):
            spread = flags * (len(pairs) // len(flags))
            items = [p[0] if flag else p[1] for flag, p in zip(spread, pairs, strict=True)]
            return like_integers(g, items, first, condition, second)
    return _where(g, condition, first, second)


def _where(g: Builder, condition: Value, first: Value, second: Value) -> Value:
    widest = max((condition, first, second), key=g.rank)
    if isinstance(second, Node) and g.rank(first) < max(g.rank(widest), 1):
        number = as_scalar(g, first, second)
        if number is not None:
            return g.call(aten.where.ScalarSelf, condition, number, second)
    if isinstance(first, Node) and g.rank(second) < max(g.rank(widest), 1):
        number = as_scalar(g, second, first)
        if number is not None:
            return g.call(aten.where.ScalarOther, condition, first, number)
    return g.call(aten.where.self, condition, first, second)


def is_infinite(g: Builder, op: Op) -> Result:
    """Whether an element is infinite, of either sign or of one."""
    x = op[0]
    positive, negative = op.attribute("detect_positive", 1), op.attribute("detect_negative", 1)
    op.need(bool(positive or negative), "neither sign")
    if positive and negative:
        return g.call(aten.eq.Scalar, g.call(aten.abs.default, x), math.inf)
    return g.call(aten.eq.Scalar, x, math.inf if positive else -math.inf)


# ---- casts ----------------------------------------------------------------------------------


def cast(g: Builder, value: Value, dtype: torch.dtype) -> Value:
    """`value` in another type; integers from shapes stay integers, as floats too."""
    if g.dtype(value) == dtype:
        return value
    if isinstance(value, Integers) and dtype is not torch.bool:
        return Integers(value.items, value.scalar, dtype)
    if isinstance(value, Constant) and value.bits is not None:
        return Constant(value.tensor.to(dtype), value.name)
    return g.call(aten.to.dtype, value, dtype)


def cast_to(g: Builder, op: Op) -> Result:
    """A cast to a type given by number."""
    return cast(g, op[0], dtype_of(op.attribute("to"), op.label))


def cast_like(g: Builder, op: Op) -> Result:
    """A cast to the type of the second input."""
    return cast(g, op[0], g.dtype(op[1]))


def rounded(target: Target) -> Handler:
    """A rounding, which leaves sizes that were cast to floats as they are."""

    def build(g: Builder, op: Op) -> Result:
        return op[0] if isinstance(op[0], Integers) else g.call(target, op[0])

    return build


def negate(g: Builder, op: Op) -> Result:
    """The negative."""
    value = op[0]
    if isinstance(value, Integers):
        items = [g.integer(operator.neg, item) for item in value.items]
        return like_integers(g, items, value)
    return g.call(aten.neg.default, value)


TABLE: Table = MappingProxyType(
    {
        "Abs": unary(aten.abs.default),
        "Add": add,
        "And": lambda g, op: g.call(aten.logical_and.default, op[0], op[1]),
        "Atan": unary(aten.atan.default),
        "BitwiseAnd": lambda g, op: g.call(aten.bitwise_and.Tensor, op[0], op[1]),
        "BitwiseNot": unary(aten.bitwise_not.default),
        "BitwiseOr": lambda g, op: g.call(aten.bitwise_or.Tensor, op[0], op[1]),
        "Cast": cast_to,
        "CastLike": cast_like,
        "Ceil": rounded(aten.ceil.default),
        "Cos": unary(aten.cos.default),
        "Div": divide,
        "Erf": unary(aten.erf.default),
        "Exp": unary(aten.exp.default),
        "Floor": rounded(aten.floor.default),
        "Identity": keep,
        "IsInf": is_infinite,
        "IsNaN": unary(aten.isnan.default),
        "Log": unary(aten.log.default),
        "Max": extreme(aten.maximum.default, torch.sym_max, "min"),
        "Mean": average,
        "Min": extreme(aten.minimum.default, torch.sym_min, "max"),
        "Mod": modulo,
        "Mul": arithmetic(aten.mul.Tensor, operator.mul, commutes=True),
        "Neg": negate,
        "Not": unary(aten.logical_not.default),
        "Or": lambda g, op: g.call(aten.logical_or.default, op[0], op[1]),
        "Pow": power,
        "Reciprocal": unary(aten.reciprocal.default),
        "Round": rounded(aten.round.default),
        "Sign": unary(aten.sign.default),
        "Sin": unary(aten.sin.default),
        "Sqrt": unary(aten.sqrt.default),
        "Sub": subtract,
        "Sum": total,
        "Where": choose,
        "Xor": exclusive_or,
        **dict.fromkeys(_COMPARE, compare),
    }
)
"""ONNX operator -> builder."""
