"""Sums, means, extrema and norms over axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lamella.ir.ops import aten
from lamella.rules.relevance.broadcast import axes_of, full_like, product_of, ratio, times
from lamella.rules.relevance.rule import Coefficients, Rule, nothing

Target = Callable[..., Any]


def _widened(coefficient: Any, axes: list[int], keepdim: bool) -> Any:
    """With the axes that were reduced, one entry each."""
    if not keepdim:
        for axis in axes:
            coefficient = aten.unsqueeze.default(coefficient, axis)
    return coefficient


def total(
    coefficient: Any, output: Any, self: Any, dim: Any = None, keepdim: bool = False, *rest: Any
) -> Coefficients:
    """Every term gets what the sum has."""
    wide = _widened(coefficient, axes_of(dim, self.ndim), keepdim)
    return (aten.expand.default(wide, list(self.shape)), *(None,) * (2 + len(rest)))


def mean(
    coefficient: Any, output: Any, self: Any, dim: Any = None, keepdim: bool = False, *rest: Any
) -> Coefficients:
    """Every term gets its part."""
    axes = axes_of(dim, self.ndim)
    count = product_of([self.shape[axis] for axis in axes])
    wide = _widened(coefficient, axes, keepdim) / count
    return (aten.expand.default(wide, list(self.shape)), *(None,) * (2 + len(rest)))


def over_all(rule: Rule) -> Rule:
    """The rule of a reduction over all axes, whose operator takes no axes."""

    def of_all(coefficient: Any, output: Any, self: Any, *rest: Any) -> Coefficients:
        return (rule(coefficient, output, self)[0], *(None,) * len(rest))

    return of_all


def extremum(
    coefficient: Any, output: Any, self: Any, dim: Any = (), keepdim: bool = False
) -> Coefficients:
    """The winners share."""
    axes = axes_of(dim, self.ndim)
    wins = self == _widened(output, axes, keepdim)
    count = aten.sum.dim_IntList(aten.to.dtype(wins, self.dtype), axes, True)
    part = _widened(coefficient, axes, keepdim) / count
    return aten.where.ScalarOther(wins, part, 0.0), None, None


def product(half: bool) -> Rule:
    """``y / x``, divided by the number of factors where products conserve."""

    def rule(
        coefficient: Any, output: Any, self: Any, dim: int, keepdim: bool = False, *rest: Any
    ) -> Coefficients:
        axes = axes_of(dim, self.ndim)
        wide = _widened(coefficient * output, axes, keepdim)
        wide = wide / self.shape[axes[0]] if half else wide
        return (ratio(wide, self, 0.0), *(None,) * (2 + len(rest)))

    return rule


def cumsum(coefficient: Any, output: Any, self: Any, dim: int, dtype: Any = None) -> Coefficients:
    """The sum over everything that comes after."""
    axis = int(dim) % max(self.ndim, 1)
    back = aten.flip.default(coefficient, [axis])
    return aten.flip.default(aten.cumsum.default(back, axis), [axis]), None, None


def vector_norm(  # noqa: PLR0913  (the arguments of the operator)
    coefficient: Any,
    output: Any,
    self: Any,
    ord: float = 2,
    dim: Any = None,
    keepdim: bool = False,
    dtype: Any = None,
) -> Coefficients:
    """Degree one: ``sgn(x) (|x| / y)^(p - 1)``."""
    axes = axes_of(dim, self.ndim)
    share = ratio(self, _widened(output, axes, keepdim), 0.0)
    if ord != 2:
        size = aten.pow.Tensor_Scalar(aten.abs.default(share), float(ord) - 1)
        share = aten.sign.default(self) * size
    return (share * _widened(times(coefficient, 1.0), axes, keepdim), *(None,) * 4)


def variance(half: bool) -> Rule:
    """Degree two: the adjoint, or half of it."""

    def rule(
        coefficient: Any,
        output: Any,
        self: Any,
        dim: Any = None,
        correction: Any = None,
        keepdim: bool = False,
    ) -> Coefficients:
        axes = axes_of(dim, self.ndim)
        count = product_of([self.shape[axis] for axis in axes])
        centred = self - aten.mean.dim(self, axes, True)
        wide = _widened(coefficient, axes, keepdim)
        less = 1 if correction is None else correction
        factor = full_like(wide, 1.0 if half else 2.0) / (count - less)
        return centred * (wide * factor), None, None, None

    return rule


REDUCTIONS: Mapping[Target, Rule] = MappingProxyType(
    {
        aten.sum.dim_IntList: total,
        aten.mean.dim: mean,
        aten.sum.default: over_all(total),
        aten.mean.default: over_all(mean),
        aten.amax.default: extremum,
        aten.amin.default: extremum,
        aten.cumsum.default: cumsum,
        aten.linalg_vector_norm.default: vector_norm,
        aten.any.dim: nothing,
        aten.all.dim: nothing,
    }
)
"""Operator -> rule, the same in every preset."""

PLAIN: Mapping[Target, Rule] = MappingProxyType(
    {aten.prod.dim_int: product(half=False), aten.var.correction: variance(half=False)}
)
"""By their adjoints."""

CONSERVING: Mapping[Target, Rule] = MappingProxyType(
    {aten.prod.dim_int: product(half=True), aten.var.correction: variance(half=True)}
)
"""Divided by the degree."""
