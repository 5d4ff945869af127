"""Linear layers and convolutions with constant weights: the adjoint, and the epsilon rule.

References:
    [Bach2015], equation 58, divided by the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lamella.ir.ops import aten, lam
from lamella.rules.relevance.rule import Coefficients, Rule

Target = Callable[..., Any]


@dataclass(frozen=True)
class Contraction:
    """A layer that is linear in its input, with the weight and the bias as they are given.

    Attributes:
        forward: ``(input, weight, bias) -> output``.
        adjoint: ``(coefficient, weight, input) -> coefficient of the input``; of the input only
            the shape is read.
        bias_axis: The axis of the output along which the bias lies.
    """

    forward: Callable[[Any, Any, Any], Any]
    adjoint: Callable[[Any, Any, Any], Any]
    bias_axis: int

    def bias_sum(self, coefficient: Any) -> Any:
        """The coefficient of the bias: the sum over everything else."""
        axis = self.bias_axis % coefficient.ndim
        axes = [other for other in range(coefficient.ndim) if other != axis]
        return aten.sum.dim_IntList(coefficient, axes) if axes else coefficient


Opened = Callable[..., Contraction]
"""From the arguments of an operator behind input, weight and bias to the contraction."""


def epsilon(opened: Opened, stabilizer: float = 0.0) -> Rule:
    """The epsilon rule: ``M_x = W^T (M_y |y| / (|y| + epsilon))``, never a division by zero.

    Args:
        opened: The layer.
        stabilizer: In units of the output; 0 is the plain adjoint, which conserves up to what
            the bias absorbs.
    """

    def rule(
        coefficient: Any, output: Any, input: Any, weight: Any, bias: Any = None, *rest: Any
    ) -> Coefficients:
        layer = opened(*rest)
        if stabilizer:
            size = aten.abs.default(output)
            coefficient = coefficient * (size / (size + stabilizer))
        found = layer.adjoint(coefficient, weight, input)
        of_bias = None if bias is None else layer.bias_sum(coefficient)
        return (found, None, of_bias, *(None,) * len(rest))

    return rule


def transposed(matrix: Any) -> Any:
    """The last two axes exchanged."""
    return aten.transpose.int(matrix, matrix.ndim - 2, matrix.ndim - 1)


def linear() -> Contraction:
    """``x W^T + b``."""
    return Contraction(
        aten.linear.default,
        lambda coefficient, weight, input: aten.matmul.default(coefficient, weight),
        -1,
    )


def convolution(axes: int) -> Opened:
    """A convolution over one or two axes; its adjoint is the transposed convolution."""
    forward = aten.conv1d.default if axes == 1 else aten.conv2d.default

    def opened(stride: Any, padding: Any, dilation: Any, groups: int) -> Contraction:
        steps = _Steps(_each(stride, axes), _each(padding, axes), _each(dilation, axes), groups)

        def adjoint(coefficient: Any, weight: Any, input: Any) -> Any:
            if axes == 2:
                return _transposed_convolution(coefficient, weight, input, steps)
            # There is one transposed convolution, over two axes: the first has one row.
            row = [aten.unsqueeze.default(value, 2) for value in (coefficient, weight, input)]
            wide = _transposed_convolution(row[0], row[1], row[2], steps.with_row())
            return aten.squeeze.dim(wide, 2)

        return Contraction(
            lambda x, w, b: forward(x, w, b, stride, padding, dilation, groups), adjoint, 1
        )

    return opened


@dataclass(frozen=True)
class _Steps:
    """How a window moves, for each axis."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def with_row(self) -> _Steps:
        return _Steps([1, *self.stride], [0, *self.padding], [1, *self.dilation], self.groups)


def _transposed_convolution(coefficient: Any, weight: Any, input: Any, steps: _Steps) -> Any:
    """Exactly of the shape of `input`: what the windows leave out at the end gets zeros."""
    sizes, made = list(input.shape[-2:]), list(coefficient.shape[-2:])
    kernel = [int(size) for size in weight.shape[-2:]]
    reach = [(size - 1) * gap + 1 for size, gap in zip(kernel, steps.dilation, strict=True)]
    if all(isinstance(size, int) for size in (*sizes, *made)):
        left = [
            size - ((count - 1) * step - 2 * pad + span)
            for size, count, step, pad, span in zip(
                sizes, made, steps.stride, steps.padding, reach, strict=True
            )
        ]
        if all(
            0 <= rest < step or rest == 0 for rest, step in zip(left, steps.stride, strict=True)
        ):
            return _apart(coefficient, weight, steps, steps.padding, left)
    whole = _apart(coefficient, weight, steps, [0, 0], [0, 0])
    amounts: list[Any] = []
    for axis in (1, 0):
        pad, size = steps.padding[axis], sizes[axis]
        amounts += [-pad, size + pad - whole.shape[axis - 2]]
    if all(isinstance(amount, int) and amount == 0 for amount in amounts):
        return whole
    return aten.pad.default(whole, amounts)


def _apart(
    coefficient: Any, weight: Any, steps: _Steps, padding: list[int], rest: list[int]
) -> Any:
    return aten.conv_transpose2d.input(
        coefficient, weight, None, steps.stride, padding, rest, steps.groups, steps.dilation
    )


def transposed_convolution(
    stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> Contraction:
    """The transposed convolution over two axes; its adjoint is the convolution."""

    def forward(x: Any, w: Any, b: Any) -> Any:
        more = (stride, padding, output_padding, groups, dilation)
        return aten.conv_transpose2d.input(x, w, b, *more)

    def adjoint(coefficient: Any, weight: Any, input: Any) -> Any:
        wide = aten.conv2d.default(coefficient, weight, None, stride, padding, dilation, groups)
        for axis in (2, 3):
            # Output padding can make room for one more window than there was input.
            if wide.shape[axis] is not input.shape[axis]:
                wide = aten.slice.Tensor(wide, axis, 0, input.shape[axis])
        return wide

    return Contraction(forward, adjoint, 1)


def _each(given: Sequence[int] | int, axes: int) -> list[int]:
    listed = list(given) if isinstance(given, list | tuple) else [int(given)]  # pyright: ignore[reportArgumentType]
    return listed * axes if len(listed) == 1 else listed


def grouped_linear(
    coefficient: Any, output: Any, input: Any, weight: Any, offsets: Any
) -> Coefficients:
    """The linear layers of experts, each with its weight the other way round."""
    return lam.grouped_linear.default(coefficient, transposed(weight), offsets), None, None


def linear_int8(  # noqa: PLR0913  (the arguments of the operator)
    coefficient: Any, output: Any, input: Any, weight: Any, scales: Any, bias: Any, per_row: bool
) -> Coefficients:
    """Straight through the rounding of the input: ``M_x = (M_y scale) codes``."""
    scaled = coefficient * aten.to.dtype(scales, coefficient.dtype)
    found = aten.matmul.default(scaled, aten.to.dtype(weight, coefficient.dtype))
    of_bias = None if bias is None else linear().bias_sum(coefficient)
    return found, None, None, of_bias, None


def linear_int8_static(  # noqa: PLR0913  (the arguments of the operator)
    coefficient: Any,
    output: Any,
    input: Any,
    weight: Any,
    scales: Any,
    bias: Any,
    step: float,
    zero: int,
) -> Coefficients:
    """Straight through the rounding of the input, and through the ends of its range."""
    *found, _ = linear_int8(coefficient, output, input, weight, scales, bias, False)
    return (*found, None, None)


def conv_int8(  # noqa: PLR0913  (the arguments of the operator)
    coefficient: Any,
    output: Any,
    input: Any,
    weight: Any,
    scales: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    step: float,
    zero: int,
    out_step: float,
    out_zero: int,
) -> Coefficients:
    """Straight through all roundings; what a rectifier at the end cut off gets nothing."""
    if out_zero == 0:
        passed = aten.to.dtype(aten.gt.Scalar(output, 0), coefficient.dtype)
        coefficient = aten.mul.Tensor(coefficient, passed)
    axes = weight.ndim - 2
    along = aten.reshape.default(aten.to.dtype(scales, coefficient.dtype), [-1, *[1] * (axes + 1)])
    dense = aten.mul.Tensor(aten.to.dtype(weight, coefficient.dtype), along)
    layer = convolution(axes)(stride, padding, dilation, groups)
    found = layer.adjoint(coefficient, dense, input)
    of_bias = None if bias is None else layer.bias_sum(coefficient)
    return (found, None, None, of_bias, *(None,) * 8)


def linear_nbits(  # noqa: PLR0913  (the arguments of the operator)
    coefficient: Any,
    output: Any,
    input: Any,
    packed: Any,
    scales: Any,
    zero_points: Any,
    bias: Any,
    bits: int,
    block: int,
    int8_activations: bool,
) -> Coefficients:
    """Straight through the rounding of the input, by the weight that the codes stand for."""
    width = int(input.shape[-1])
    more = (bits, block, width)
    weight = lam.dequantize_nbits.default(packed, scales, zero_points, *more)
    found = aten.matmul.default(coefficient, aten.to.dtype(weight, coefficient.dtype))
    of_bias = None if bias is None else linear().bias_sum(coefficient)
    return (found, None, None, None, of_bias, None, None, None)


LAYERS: Mapping[Target, Opened] = MappingProxyType(
    {
        aten.linear.default: linear,
        aten.conv1d.default: convolution(1),
        aten.conv2d.default: convolution(2),
        aten.conv_transpose2d.input: transposed_convolution,
    }
)
"""Layers that the rules for weights can treat alike."""


def layers(stabilizer: float = 0.0) -> dict[Target, Rule]:
    """The epsilon rule for every layer; quantized ones and experts by the plain adjoint."""
    return {
        **{target: epsilon(opened, stabilizer) for target, opened in LAYERS.items()},
        lam.grouped_linear.default: grouped_linear,
        lam.linear_int8.default: linear_int8,
        lam.linear_int8_static.default: linear_int8_static,
        lam.conv_int8.default: conv_int8,
        lam.linear_nbits.default: linear_nbits,
    }
