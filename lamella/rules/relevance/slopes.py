"""Slopes of elementwise functions: the tangent of calculus and the secant of relevance.

The secant ``f(x) / x`` conserves exactly where ``f(0) = 0``. Functions with another value at
zero have the centred secant ``(f(x) - f(0)) / x``; the ledger shows what ``f(0)`` absorbs.
Closed forms avoid the division where there are some. Homogeneous functions of degree `k` have
``f'(x) / k``, which is the secant.

References:
    [Achtibat2024] (the identity rule).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lamella.ir.ops import aten
from lamella.rules.relevance.broadcast import ratio

Slope = Callable[..., Any]

_NEAR_ZERO = 1e-2
"""Where the centred secants of functions without a closed form turn into their series: the terms
left out and the cancellation are both below 1e-12 there in float64."""


@dataclass(frozen=True)
class Slopes:
    """Two slopes of one function; both are called with the output and the arguments.

    Attributes:
        tangent: The derivative.
        secant: The slope of the line to the value at zero.
    """

    tangent: Slope
    secant: Slope


def through_zero(limit: float) -> Slope:
    """``y / x`` with its limit at zero."""
    return lambda y, x, *_: ratio(y, x, limit)


def _gelu_cdf(x: Any, approximate: str) -> Any:
    if approximate == "tanh":
        inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        return (aten.tanh.default(inner) + 1.0) * 0.5
    return (aten.erf.default(x * math.sqrt(0.5)) + 1.0) * 0.5


def _gelu_tangent(y: Any, x: Any, approximate: str = "none") -> Any:
    cdf = _gelu_cdf(x, approximate)
    if approximate == "tanh":
        inner = (x * x * (3 * 0.044715) + 1.0) * math.sqrt(2 / math.pi)
        return cdf + x * cdf * (1.0 - cdf) * 2.0 * inner
    return cdf + x * aten.exp.default(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))


def _gelu_secant(y: Any, x: Any, approximate: str = "none") -> Any:
    return _gelu_cdf(x, approximate)


def _silu_tangent(y: Any, x: Any) -> Any:
    gate = aten.sigmoid.default(x)
    return gate * (x * (1.0 - gate) + 1.0)


def _silu_secant(y: Any, x: Any) -> Any:
    return aten.sigmoid.default(x)


def _mish_secant(y: Any, x: Any) -> Any:
    return aten.tanh.default(aten.softplus.default(x))


def _mish_tangent(y: Any, x: Any) -> Any:
    gate = _mish_secant(y, x)
    return gate + x * (1.0 - gate * gate) * aten.sigmoid.default(x)


def _sigmoid_secant(y: Any, x: Any) -> Any:
    # (sigmoid(x) - 1/2) / x without cancellation.
    return ratio(aten.tanh.default(x * 0.5) * 0.5, x, 0.25)


def _softplus_tangent(y: Any, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    slope = aten.sigmoid.default(x * beta)
    return aten.where.ScalarSelf(x * beta > threshold, 1.0, slope)


def _softplus_secant(y: Any, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    scaled = x * beta
    series = scaled * (0.125 - scaled * scaled * (1 / 192)) + 0.5
    return _near(scaled, series, y - math.log(2.0) / beta, x)


def _exp_secant(y: Any, x: Any) -> Any:
    series = (((x * (1 / 120) + 1 / 24) * x + 1 / 6) * x + 0.5) * x + 1.0
    return _near(x, series, y - 1.0, x)


def _cos_secant(y: Any, x: Any) -> Any:
    # (cos(x) - 1) / x = -sin(x / 2) * sin(x / 2) / (x / 2)
    half = aten.sin.default(x * 0.5)
    return ratio(half * half * -2.0, x, 0.0)


def _near(scaled: Any, series: Any, numerator: Any, x: Any) -> Any:
    close = aten.abs.default(scaled) < _NEAR_ZERO
    return aten.where.self(close, series, numerator / aten.where.ScalarSelf(close, 1.0, x))


def _elu_tangent(
    y: Any, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Any:
    negative = (y + scale * alpha) * input_scale
    return aten.where.ScalarSelf(x > 0, scale, negative)


def _hardswish_tangent(y: Any, x: Any) -> Any:
    middle = aten.where.ScalarSelf(x >= 3.0, 1.0, x * (1 / 3) + 0.5)
    return aten.where.ScalarSelf(x <= -3.0, 0.0, middle)


def _inside(low: Any, high: Any) -> Slope:
    """One where the function is not clipped."""

    def slope(y: Any, x: Any, *_: Any) -> Any:
        cast = aten.to.dtype(x > low, x.dtype)
        return aten.where.ScalarOther(x < high, cast, 0.0)

    return slope


def _hardtanh_tangent(y: Any, x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    return _inside(min_val, max_val)(y, x)


def _clamp_tangent(y: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    # A value at the bound counts as inside, as in PyTorch.
    inside = aten.to.dtype(x >= (-math.inf if low is None else low), x.dtype)
    return aten.where.ScalarOther(x <= (math.inf if high is None else high), inside, 0.0)


def _clamp_secant(y: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    at_zero = min(max(0.0, low), high)
    return ratio(y if at_zero == 0.0 else y - at_zero, x, float(low < 0 < high))


def _pow_tangent(y: Any, x: Any, exponent: float) -> Any:
    return _pow_secant(y, x, exponent) * exponent


def _pow_secant(y: Any, x: Any, exponent: float) -> Any:
    if exponent == 2:
        return x
    return aten.pow.Tensor_Scalar(x, exponent - 1)


def _leaky(y: Any, x: Any, negative_slope: float = 0.01) -> Any:
    positive = aten.to.dtype(x > 0, x.dtype)
    return positive * (1.0 - negative_slope) + negative_slope


def _sign(y: Any, x: Any) -> Any:
    return aten.sign.default(x)


def _inverse(y: Any, x: Any) -> Any:
    return aten.reciprocal.default(x)


def _one_plus_square(x: Any) -> Any:
    return x * x + 1.0


def _root_of_one_and_square(y: Any, sign: float) -> Any:
    return aten.sqrt.default(y * y * sign + 1.0)


_CORE: Mapping[Callable[..., Any], Slopes] = MappingProxyType(
    {
        aten.expm1.default: Slopes(lambda y, x: y + 1.0, through_zero(1.0)),
        aten.tan.default: Slopes(lambda y, x: _one_plus_square(y), through_zero(1.0)),
        aten.sinh.default: Slopes(lambda y, x: _root_of_one_and_square(y, 1.0), through_zero(1.0)),
        aten.asinh.default: Slopes(
            lambda y, x: aten.reciprocal.default(_root_of_one_and_square(x, 1.0)),
            through_zero(1.0),
        ),
        aten.asin.default: Slopes(
            lambda y, x: aten.reciprocal.default(_root_of_one_and_square(x, -1.0)),
            through_zero(1.0),
        ),
        aten.acos.default: Slopes(
            lambda y, x: aten.reciprocal.default(_root_of_one_and_square(x, -1.0)) * -1.0,
            lambda y, x: ratio(y - math.pi / 2, x, -1.0),
        ),
        aten.atanh.default: Slopes(
            lambda y, x: aten.reciprocal.default(1.0 - x * x), through_zero(1.0)
        ),
        aten.cosh.default: Slopes(
            lambda y, x: aten.sign.default(x) * aten.sqrt.default(y * y - 1.0),
            lambda y, x: ratio(y - 1.0, x, 0.0),
        ),
        aten.log2.default: Slopes(
            lambda y, x: _inverse(y, x) * (1 / math.log(2.0)),
            lambda y, x: _inverse(y, x) * (1 / math.log(2.0)),
        ),
        aten.log10.default: Slopes(
            lambda y, x: _inverse(y, x) * (1 / math.log(10.0)),
            lambda y, x: _inverse(y, x) * (1 / math.log(10.0)),
        ),
    }
)
"""Core functions that are not canonical: a graph that was not made so can hold them."""


SLOPES: Mapping[Callable[..., Any], Slopes] = MappingProxyType(
    {
        aten.gelu.default: Slopes(_gelu_tangent, _gelu_secant),
        aten.silu.default: Slopes(_silu_tangent, _silu_secant),
        aten.mish.default: Slopes(_mish_tangent, _mish_secant),
        aten.hardswish.default: Slopes(
            _hardswish_tangent,
            lambda y, x: aten.clamp.default(x + 3.0, 0.0, 6.0) * (1 / 6),
        ),
        aten.tanh.default: Slopes(lambda y, x: 1.0 - y * y, through_zero(1.0)),
        aten.erf.default: Slopes(
            lambda y, x: aten.exp.default(x * x * -1.0) * (2 / math.sqrt(math.pi)),
            through_zero(2 / math.sqrt(math.pi)),
        ),
        aten.sin.default: Slopes(lambda y, x: aten.cos.default(x), through_zero(1.0)),
        aten.atan.default: Slopes(
            lambda y, x: aten.reciprocal.default(_one_plus_square(x)), through_zero(1.0)
        ),
        aten.log1p.default: Slopes(
            lambda y, x: aten.reciprocal.default(x + 1.0), through_zero(1.0)
        ),
        aten.elu.default: Slopes(_elu_tangent, through_zero(1.0)),
        aten.hardtanh.default: Slopes(_hardtanh_tangent, through_zero(1.0)),
        aten.clamp.default: Slopes(_clamp_tangent, _clamp_secant),
        aten.leaky_relu.default: Slopes(_leaky, _leaky),
        aten.abs.default: Slopes(_sign, _sign),
        aten.square.default: Slopes(lambda y, x: x * 2.0, lambda y, x: x),
        aten.pow.Tensor_Scalar: Slopes(_pow_tangent, _pow_secant),
        aten.sqrt.default: Slopes(
            lambda y, x: aten.reciprocal.default(y) * 0.5, lambda y, x: ratio(y, x, 0.0)
        ),
        aten.rsqrt.default: Slopes(lambda y, x: y / x * -0.5, lambda y, x: y / x),
        aten.reciprocal.default: Slopes(lambda y, x: y * y * -1.0, lambda y, x: y * y),
        aten.sigmoid.default: Slopes(lambda y, x: y * (1.0 - y), _sigmoid_secant),
        aten.hardsigmoid.default: Slopes(
            lambda y, x: _inside(-3.0, 3.0)(y, x) * (1 / 6),
            lambda y, x: ratio(y - 0.5, x, 1 / 6),
        ),
        aten.softplus.default: Slopes(_softplus_tangent, _softplus_secant),
        aten.exp.default: Slopes(lambda y, x: y, _exp_secant),
        aten.cos.default: Slopes(lambda y, x: aten.sin.default(x) * -1.0, _cos_secant),
        # Without a value at zero there is no secant: the tangent, and a leak in the ledger.
        aten.log.default: Slopes(_inverse, _inverse),
        **_CORE,
    }
)
"""Operator of one tensor -> its slopes."""
