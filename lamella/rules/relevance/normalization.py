"""Norms: the statistics are held fixed, or are differentiated as well.

Plain gradients through a norm return a total near zero: it does not change when its input
grows. Holding the divisor fixed makes a norm linear.

References:
    [Ali2022] (the rule for layer norm).
"""

from __future__ import annotations

from typing import Any

import torch

from lamella.ir.ops import aten
from lamella.rules.relevance.broadcast import product_of, sum_to
from lamella.rules.relevance.rule import Coefficients, Rule


def layer_norm(whole: bool) -> Rule:
    """``M_x = rstd (w M - mean(w M))``; `whole` also differentiates the deviation.

    The share of the bias is a leak, which can be large.
    """

    def rule(  # noqa: PLR0913  (the arguments of the operator)
        coefficient: Any,
        output: Any,
        input: Any,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        *rest: Any,
    ) -> Coefficients:
        axes = list(range(input.ndim - len(normalized_shape), input.ndim))
        found = _centred(_weighted(coefficient, weight), input, axes, eps, whole=whole)
        of_bias = None if bias is None else sum_to(coefficient, bias)
        return (found, None, None, of_bias, None, *(None,) * len(rest))

    return rule


def group_norm(whole: bool) -> Rule:
    """As `layer_norm` over the channels of a group and all positions."""

    def rule(  # noqa: PLR0913  (the arguments of the operator)
        coefficient: Any,
        output: Any,
        input: Any,
        num_groups: int,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        *rest: Any,
    ) -> Coefficients:
        shape, channels = list(input.shape), int(input.shape[1])
        grouped = [shape[0], num_groups, (channels // num_groups) * product_of(shape[2:])]
        scales = None if weight is None else _per_channel(weight, input.ndim)
        scaled = _weighted(coefficient, scales)
        rows = aten.reshape.default(input, grouped)
        found = _centred(aten.reshape.default(scaled, grouped), rows, [2], eps, whole=whole)
        of_bias = None
        if bias is not None:
            others = [axis for axis in range(input.ndim) if axis != 1]
            of_bias = aten.sum.dim_IntList(coefficient, others)
        back = aten.reshape.default(found, shape)
        return (back, None, None, of_bias, None, *(None,) * len(rest))

    return rule


def rms_norm(whole: bool) -> Rule:
    """``M_x = w M rstd``, which conserves exactly; `whole` differentiates the norm as well."""

    def rule(
        coefficient: Any,
        output: Any,
        input: Any,
        normalized_shape: Any,
        weight: Any = None,
        eps: Any = None,
    ) -> Coefficients:
        axes = list(range(input.ndim - len(normalized_shape), input.ndim))
        small = torch.finfo(input.dtype).eps if eps is None else eps
        found = _normed(_weighted(coefficient, weight), input, axes, small, whole=whole)
        return found, None, None, None

    return rule


def batch_norm(  # noqa: PLR0913  (the arguments of the operator)
    coefficient: Any,
    output: Any,
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Coefficients:
    """Statistics are constants: a factor and an offset for each channel."""
    factor = _weighted(aten.rsqrt.default(running_var + eps), weight)
    found = coefficient * _per_channel(factor, input.ndim)
    return (found, *(None,) * 8)


def _centred(scaled: Any, input: Any, axes: list[int], eps: float, *, whole: bool) -> Any:
    """Through the norm of what is left of `input` without its mean."""
    # `aten.var` takes several times as long as the means of values and of squares.
    offset = input - aten.mean.dim(input, axes, True)
    centred = scaled - aten.mean.dim(scaled, axes, True)
    return _normed(centred, offset, axes, eps, whole=whole)


def _normed(scaled: Any, input: Any, axes: list[int], eps: float, *, whole: bool) -> Any:
    """Through ``x / sqrt(mean x^2 + eps)``, whose root is held fixed unless `whole`."""
    inverse = aten.rsqrt.default(aten.mean.dim(input * input, axes, True) + eps)
    if whole:
        unit = input * inverse
        scaled = scaled - unit * aten.mean.dim(scaled * unit, axes, True)
    return scaled * inverse


def _weighted(coefficient: Any, weight: Any) -> Any:
    return coefficient if weight is None else coefficient * weight


def _per_channel(values: Any, rank: int) -> Any:
    return aten.reshape.default(values, [1, int(values.shape[0]), *[1] * (rank - 2)])
