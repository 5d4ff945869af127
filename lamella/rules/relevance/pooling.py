"""Pooling and resizing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lamella.errors import MissingRuleError
from lamella.ir.ops import aten
from lamella.rules.relevance.contraction import convolution
from lamella.rules.relevance.rule import Coefficients, Rule

Target = Callable[..., Any]


def max_pool2d(
    coefficient: Any, output: Any, self: Any, kernel_size: Any, *rest: Any
) -> Coefficients:
    """The winner of each window gets all; one that wins twice gets both."""
    given = aten.max_pool2d_with_indices.default(self, kernel_size, *rest)
    return (_to_winners(coefficient, given[1], self), *(None,) * (1 + len(rest)))


def max_pool2d_with_indices(coefficient: Any, output: Any, self: Any, *rest: Any) -> Coefficients:
    """The same, where the winners are known from the forward."""
    return (_to_winners(coefficient[0], output[1], self), *(None,) * len(rest))


def _to_winners(coefficient: Any, winners: Any, self: Any) -> Any:
    lead = list(self.shape[:-2])
    entries = self.shape[-2] * self.shape[-1]
    windows = coefficient.shape[-2] * coefficient.shape[-1]
    places = aten.reshape.default(winners, [*lead, windows])
    values = aten.reshape.default(coefficient, [*lead, windows])
    zeros = aten.full.default([*lead, entries], 0.0, dtype=self.dtype)
    sums = aten.scatter_add.default(zeros, self.ndim - 2, places, values)
    return aten.reshape.default(sums, list(self.shape))


def average(axes: int) -> Rule:
    """Windows get equal parts: the adjoint of a convolution with ones."""

    def rule(  # noqa: PLR0913  (the arguments of the operator)
        coefficient: Any,
        output: Any,
        self: Any,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Any = None,
    ) -> Coefficients:
        kernel = _each(kernel_size, axes)
        step = _each(stride, axes) if _given(stride) else kernel
        pads = _each(padding, axes)
        image = [1, 1, *self.shape[self.ndim - axes :]]
        layer = convolution(axes)(step, pads, [1] * axes, 1)
        ones = aten.full.default([1, 1, *kernel], 1.0, dtype=self.dtype)
        if ceil_mode or (any(pads) and not count_include_pad and not divisor_override):
            raise MissingRuleError(
                "no relevance rule for average pooling with ceil_mode or without padding in its "
                "counts; give one with RuleTable.override"
            )
        size = 1
        for extent in kernel:
            size *= extent
        part = coefficient * (1.0 / (divisor_override or size))
        rows = -1
        flat = aten.reshape.default(part, [rows, 1, *output.shape[output.ndim - axes :]])
        like = aten.reshape.default(self, [rows, *image[1:]])
        found = layer.adjoint(flat, ones, like)
        count = 5 if axes == 1 else 6
        return (aten.reshape.default(found, list(self.shape)), *(None,) * count)

    return rule


def adaptive_average(axes: int) -> Rule:
    """Windows get equal parts; they may overlap."""

    def rule(coefficient: Any, output: Any, self: Any, output_size: Any) -> Coefficients:
        for place in range(axes):
            axis = self.ndim - axes + place
            coefficient = _spread(coefficient, axis, self.shape[axis])
        return coefficient, None

    return rule


def _spread(coefficient: Any, axis: int, size: Any) -> Any:
    """The adjoint of means over ``[floor(i n / m), ceil((i + 1) n / m))`` along one axis."""
    count = coefficient.shape[axis]
    shape = list(coefficient.shape)
    if isinstance(count, int) and count == 1:
        shape[axis] = size
        return aten.expand.default(coefficient / size, shape)
    if not (isinstance(size, int) and isinstance(count, int)):
        raise MissingRuleError(
            "no relevance rule for adaptive pooling to more than one entry of a size that "
            "varies; capture with dynamic=False"
        )
    total: Any = None
    for place in range(count):
        start, stop = place * size // count, -(-(place + 1) * size // count)
        shape[axis] = stop - start
        part = aten.slice.Tensor(coefficient, axis, place, place + 1)
        wide = aten.expand.default(part * (1.0 / (stop - start)), shape)
        amounts = [0, 0] * (coefficient.ndim - 1 - axis) + [start, size - stop]
        padded = aten.pad.default(wide, amounts)
        total = padded if total is None else total + padded
    return total


def upsample(backward: Target) -> Rule:
    """Linear in the image: the adjoint that PyTorch has for it."""

    def rule(
        coefficient: Any, output: Any, input: Any, output_size: Any, *rest: Any
    ) -> Coefficients:
        *options, scales = rest
        axes = list(scales) if scales is not None else [None, None]
        size = list(output.shape[-2:])
        found = backward(coefficient, size, list(input.shape), *options, *axes)
        return (found, None, *(None,) * len(rest))

    return rule


def _given(stride: Any) -> bool:
    return isinstance(stride, int) or bool(stride)


def _each(given: Any, axes: int) -> list[int]:
    listed = [given] if isinstance(given, int) else list(given)
    return listed * axes if len(listed) == 1 else listed


POOLING: Mapping[Target, Rule] = MappingProxyType(
    {
        aten.max_pool2d.default: max_pool2d,
        aten.max_pool2d_with_indices.default: max_pool2d_with_indices,
        aten.avg_pool1d.default: average(1),
        aten.avg_pool2d.default: average(2),
        aten.adaptive_avg_pool1d.default: adaptive_average(1),
        aten.adaptive_avg_pool2d.default: adaptive_average(2),
        aten.upsample_nearest2d.vec: upsample(aten.upsample_nearest2d_backward.default),
        aten.upsample_bilinear2d.vec: upsample(aten.upsample_bilinear2d_backward.default),
        aten.upsample_bicubic2d.vec: upsample(aten.upsample_bicubic2d_backward.default),
    }
)
"""Operator -> rule."""
