"""Rules of elementwise operators but products: activations, sums, choices between values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lamella.ir.ops import aten, lam
from lamella.rules.relevance.broadcast import ratio, sum_to, times
from lamella.rules.relevance.rule import Coefficients, Place, Rule, nothing
from lamella.rules.relevance.slopes import SLOPES, Slope

Target = Callable[..., Any]

_ACTIVATIONS = frozenset(
    {
        aten.relu.default,
        aten.gelu.default,
        aten.silu.default,
        aten.mish.default,
        aten.hardswish.default,
        aten.tanh.default,
        aten.elu.default,
        aten.leaky_relu.default,
    }
)
"""Activations of layers; all are zero at zero."""


def by_slope(slope: Slope) -> Rule:
    """``M_x = slope * M_y`` for a function of one tensor."""

    def rule(coefficient: Any, output: Any, first: Any, *rest: Any) -> Coefficients:
        return (coefficient * slope(output, first, *rest), *(None,) * len(rest))

    return rule


def stabilized_activations(epsilon: float) -> Callable[[Place], Rule | None]:
    """Activations by ``y / (x + epsilon)``, as choices by place for `Preset.where`.

    Our secants are exact and need no stabilizer; published code divides with one, and its figures
    are reproduced with the same: in float64 `epsilon` is seen near zeros of `x`, relative to
    ``epsilon / |x|``.

    Args:
        epsilon: Added to the input, whatever its sign.

    References:
        [Achtibat2024], equation 9.
    """
    rule = by_slope(lambda y, x, *_: y / (x + epsilon))
    return lambda place: rule if place.node.target in _ACTIVATIONS else None


def relu(coefficient: Any, output: Any, self: Any) -> Coefficients:
    """Degree one: ``M`` where the result is positive; the operand need not be kept for it."""
    return (aten.threshold_backward.default(coefficient, output, 0.0),)


def add(coefficient: Any, output: Any, self: Any, other: Any, alpha: Any = 1) -> Coefficients:
    """Both operands get what the sum has."""
    return sum_to(coefficient, self), sum_to(times(coefficient, float(alpha)), other), None


def sub(coefficient: Any, output: Any, self: Any, other: Any, alpha: Any = 1) -> Coefficients:
    """As a sum with the negative operand."""
    return sum_to(coefficient, self), sum_to(coefficient * (-1.0 * alpha), other), None


def rsub(coefficient: Any, output: Any, self: Any, other: Any, alpha: Any = 1) -> Coefficients:
    """``other - alpha * self`` with a number `other`."""
    return coefficient * (-1.0 * alpha), None, None


def neg(coefficient: Any, output: Any, self: Any) -> Coefficients:
    """Linear."""
    return (coefficient * -1.0,)


def where(coefficient: Any, output: Any, condition: Any, self: Any, other: Any) -> Coefficients:
    """Each operand gets the entries that were taken from it, by selection and no product."""
    first = aten.where.ScalarOther(condition, coefficient, 0.0)
    second = aten.where.ScalarSelf(condition, 0.0, coefficient)
    return None, sum_to(first, self), sum_to(second, other)


def masked_fill(coefficient: Any, output: Any, self: Any, mask: Any, value: Any) -> Coefficients:
    """What was filled in gets the filled entries."""
    kept = aten.where.ScalarSelf(mask, 0.0, coefficient)
    filled = aten.where.ScalarOther(mask, coefficient, 0.0) if hasattr(value, "shape") else None
    return sum_to(kept, self), None, None if filled is None else sum_to(filled, value)


def extremum(larger: bool) -> Rule:
    """`maximum` and `minimum`: the winner gets all, equal values share."""

    def rule(coefficient: Any, output: Any, self: Any, other: Any) -> Coefficients:
        half = coefficient * 0.5
        wins = self > other if larger else self < other
        loses = self < other if larger else self > other
        first = aten.where.ScalarOther(aten.logical_not.default(loses), half, 0.0)
        first = aten.where.self(wins, coefficient, first)
        second = aten.where.ScalarOther(aten.logical_not.default(wins), half, 0.0)
        second = aten.where.self(loses, coefficient, second)
        return sum_to(first, self), sum_to(second, other)

    return rule


def prelu(coefficient: Any, output: Any, self: Any, weight: Any) -> Coefficients:
    """Degree one; the slopes of the channels are constants."""
    shape = [weight.shape[0]] + [1] * (self.ndim - 2) if self.ndim > 1 else [1]
    slope = aten.where.ScalarSelf(self > 0, 1.0, aten.reshape.default(weight, shape))
    return coefficient * slope, None


def power_of_number(coefficient: Any, output: Any, self: Any, exponent: Any) -> Coefficients:
    """``a ** x`` by its derivative."""
    return None, coefficient * output * math.log(self)


def centred_power_of_number(
    coefficient: Any, output: Any, self: Any, exponent: Any
) -> Coefficients:
    """``a ** x`` by its centred secant ``(a ** x - 1) / x``."""
    return None, coefficient * ratio(output - 1.0, exponent, math.log(self))


def power(half: bool) -> Rule:
    """``x ** e`` of two tensors; with `half` only the base gets anything, by its secant."""

    def rule(coefficient: Any, output: Any, self: Any, exponent: Any) -> Coefficients:
        secant = coefficient * aten.pow.Tensor_Tensor(self, exponent - 1.0)
        if half:
            return sum_to(secant, self), None
        slope = coefficient * output * aten.log.default(self)
        return sum_to(secant * exponent, self), sum_to(slope, exponent)

    return rule


def remainder(coefficient: Any, output: Any, self: Any, other: Any) -> Coefficients:
    """Slope one; the multiples of the divisor are a leak."""
    return sum_to(coefficient, self), None


def cast(coefficient: Any, output: Any, self: Any, *rest: Any) -> Coefficients:
    """Back to the dtype of the operand; rounding is a leak."""
    return (aten.to.dtype(coefficient, self.dtype), *(None,) * len(rest))


def rounded(coefficient: Any, output: Any, input: Any, *rest: Any) -> Coefficients:
    """As if nothing were rounded; what rounding changes is a leak."""
    return (coefficient, *(None,) * len(rest))


LINEAR: Mapping[Target, Rule] = MappingProxyType(
    {
        aten.add.Tensor: add,
        aten.sub.Tensor: sub,
        aten.rsub.Scalar: rsub,
        aten.neg.default: neg,
        aten.relu.default: relu,
        aten.where.self: where,
        aten.where.ScalarOther: where,
        aten.where.ScalarSelf: where,
        aten.masked_fill.Scalar: masked_fill,
        aten.masked_fill.Tensor: masked_fill,
        aten.maximum.default: extremum(larger=True),
        aten.minimum.default: extremum(larger=False),
        aten.prelu.default: prelu,
        aten.remainder.Scalar: remainder,
        aten.remainder.Tensor: remainder,
        aten.to.dtype: cast,
        lam.round_uniform.default: rounded,
        lam.round_log.default: rounded,
    }
)
"""Operators of degree one: the rule is the same in every preset."""

TANGENT: Mapping[Target, Rule] = MappingProxyType(
    {
        **{target: by_slope(slopes.tangent) for target, slopes in SLOPES.items()},
        aten.pow.Scalar: power_of_number,
        aten.pow.Tensor_Tensor: power(half=False),
    }
)
"""Activations by their derivatives."""

SECANT: Mapping[Target, Rule] = MappingProxyType(
    {
        **{target: by_slope(slopes.secant) for target, slopes in SLOPES.items()},
        aten.pow.Scalar: centred_power_of_number,
        aten.pow.Tensor_Tensor: power(half=True),
    }
)
"""Activations by their secants."""

WITHOUT: Mapping[Target, Rule] = MappingProxyType(
    dict.fromkeys(
        (
            *(aten.sign.default, aten.floor.default, aten.ceil.default, aten.round.default),
            *(aten.div.Tensor_mode, aten.floor_divide.default, aten.isnan.default),
            *(aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor),
            *(aten.ge.Tensor, aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar),
            *(aten.gt.Scalar, aten.ge.Scalar, aten.logical_and.default, aten.logical_or.default),
            *(aten.logical_not.default, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor),
            aten.bitwise_not.default,
        ),
        nothing,
    )
)
"""Operators that no relevance passes."""
