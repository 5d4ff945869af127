"""Convolutions and pooling."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.table.shapes import padded
from lamella.ir.onnx.values import Integer, Op, Result, Table, Value

aten = torch.ops.aten

_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}


@dataclass(frozen=True)
class Window:
    """Where a kernel is laid over a signal.

    Attributes:
        kernel: Its size, by spatial axis.
        strides: Its steps.
        dilations: The distance of its elements.
        pads: Elements before and after, by spatial axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[Integer, Integer], ...]

    @property
    def symmetric(self) -> bool:
        """Whether ATen can pad by itself."""
        return all(isinstance(a, int) and a == b and a >= 0 for a, b in self.pads)

    @property
    def fits_pooling(self) -> bool:
        """Whether ATen can pad by itself before pooling: by half of the kernel at most."""
        halves = zip(self.pads, self.kernel, strict=True)
        return self.symmetric and all(isinstance(p[0], int) and 2 * p[0] <= k for p, k in halves)


def window_of(g: Builder, op: Op, value: Value, kernel: Sequence[int]) -> Window:
    """The window that the attributes of `op` describe."""
    count = len(kernel)
    ones = (1,) * count
    strides = tuple(op.attribute("strides") or ones)
    dilations = tuple(op.attribute("dilations") or ones)
    automatic = op.attribute("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        sizes = g.shape(value)[2:]
        amounts = [
            _same(g, *facts) for facts in zip(sizes, kernel, strides, dilations, strict=True)
        ]
        pads = tuple(_halves(g, amount, automatic == "SAME_LOWER") for amount in amounts)
    else:
        flat = op.attribute("pads") if automatic == "NOTSET" else None
        flat = flat or (0,) * (2 * count)
        pads = tuple(zip(flat[:count], flat[count:], strict=True))
    return Window(tuple(kernel), strides, dilations, pads)


def _same(g: Builder, size: Integer, kernel: int, stride: int, dilation: int) -> Integer:
    """How much padding gives ``ceil(size / stride)`` results."""
    reach = (kernel - 1) * dilation
    if stride == 1:
        return reach
    # (ceil(size / stride) - 1) * stride is the place of the last result.
    last = g.integer(operator.floordiv, g.integer(operator.sub, size, 1), stride)
    covered = g.integer(operator.add, g.integer(operator.mul, last, stride), reach + 1)
    return g.integer(torch.sym_max, g.integer(operator.sub, covered, size), 0)


def _halves(g: Builder, amount: Integer, lower: bool) -> tuple[Integer, Integer]:
    half = g.integer(operator.floordiv, amount, 2)
    rest = g.integer(operator.sub, amount, half)
    return (rest, half) if lower else (half, rest)


def self_padded(
    g: Builder, value: Value, window: Window, fill: float | None = None
) -> tuple[Any, list[int]]:
    """`value` and the padding that ATen does itself; other padding is done before.

    `fill` is given for pooling, None stands for the zeros of a convolution.
    """
    if window.symmetric and (fill is None or window.fits_pooling):
        return value, [int(before) for before, _ in window.pads if isinstance(before, int)]
    grown = padded(g, value, [(0, 0), (0, 0), *window.pads], fill=fill or 0.0)
    return grown, [0] * len(window.pads)


def convolution(g: Builder, op: Op) -> Result:
    """A convolution over one to three axes."""
    value, weight = op[0], op[1]
    kernel = [g.static(weight, axis) or 0 for axis in range(2, g.rank(weight))]
    op.need(len(kernel) in _CONVOLUTIONS and all(kernel), f"a kernel of {len(kernel)} axes")
    window = window_of(g, op, value, kernel)
    value, pads = self_padded(g, value, window)
    steps = list(window.strides), pads, list(window.dilations)
    target = _CONVOLUTIONS[len(kernel)]
    return g.call(target, value, weight, op.optional(2), *steps, op.attribute("group", 1))


def transposed_convolution(g: Builder, op: Op) -> Result:
    """The transpose of a convolution; padding cuts the result."""
    value, weight = op[0], op[1]
    count = g.rank(weight) - 2
    op.need(count in _TRANSPOSED, f"a kernel of {count} axes")
    kernel = [g.static(weight, axis) or 0 for axis in range(2, count + 2)]
    ones = [1] * count
    strides: list[int] = list(op.attribute("strides") or ones)
    dilations: list[int] = list(op.attribute("dilations") or ones)
    extra: list[int] = list(op.attribute("output_padding") or (0,) * count)
    pads = _output_pads(g, op, (kernel, strides, dilations, extra))
    even = all(before == after for before, after in pads)
    own = [before for before, _ in pads] if even else [0] * count
    grow = extra if even or all(e < s for e, s in zip(extra, strides, strict=True)) else [0] * count
    rest = strides, own, grow, op.attribute("group", 1), dilations
    result = g.call(_TRANSPOSED[count], value, weight, op.optional(2), *rest)
    if even:
        return result
    return padded(g, result, [(0, 0), (0, 0), *((-before, -after) for before, after in pads)])


def _output_pads(
    g: Builder, op: Op, facts: tuple[list[int], list[int], list[int], list[int]]
) -> list[tuple[int, int]]:
    """What is cut from both ends of each axis, from any of the three ways to say it."""
    kernel, strides, dilations, extra = facts
    automatic, wanted = op.attribute("auto_pad", "NOTSET"), op.attribute("output_shape")
    count = len(kernel)
    if wanted is None and automatic in ("NOTSET", "VALID"):
        flat = op.attribute("pads") or (0,) * (2 * count)
        flat = flat if automatic == "NOTSET" else (0,) * (2 * count)
        return list(zip(flat[:count], flat[count:], strict=True))
    pads: list[tuple[int, int]] = []
    for place in range(count):
        size = g.static(op[0], place + 2)
        reach = (kernel[place] - 1) * dilations[place] + 1 + extra[place]
        if wanted is None:
            surplus = reach - strides[place]
        else:
            op.need(size is not None, "output_shape with a dynamic input")
            surplus = (
                strides[place] * ((size or 1) - 1) + reach - wanted[len(wanted) - count + place]
            )
        half = surplus // 2
        # Without SAME_UPPER the larger part is cut from the front.
        pads.append((half, surplus - half) if automatic == "SAME_UPPER" else (surplus - half, half))
    return pads


# ---- pooling --------------------------------------------------------------------------------


def _as_plane(g: Builder, value: Value, window: Window) -> tuple[Any, Window, bool]:
    """A signal of one axis as an image of one row: ATen has only the latter."""
    if len(window.kernel) != 1:
        return value, window, False
    plane = g.call(aten.unsqueeze.default, value, 2)
    one = (1,)
    wide = Window(
        one + window.kernel, one + window.strides, one + window.dilations, ((0, 0), *window.pads)
    )
    return plane, wide, True


def max_pool(g: Builder, op: Op) -> Result:
    """The largest value under a window; outside of the input lies minus infinity."""
    value, kernel = op[0], op.attribute("kernel_shape")
    op.need(len(kernel) in (1, 2), f"pooling over {len(kernel)} axes")
    op.need(not op.wants(1), "the places of the largest values")
    value, window, flat = _as_plane(g, value, window_of(g, op, value, kernel))
    dtype = g.dtype(value)
    lowest = -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min
    value, pads = self_padded(g, value, window, lowest)
    steps = list(window.kernel), list(window.strides), pads, list(window.dilations)
    pooled = g.call(aten.max_pool2d.default, value, *steps, bool(op.attribute("ceil_mode", 0)))
    return g.call(aten.squeeze.dims, pooled, [2]) if flat else pooled


def average_pool(g: Builder, op: Op) -> Result:
    """The mean under a window, with or without the padding."""
    value, kernel = op[0], op.attribute("kernel_shape")
    op.need(len(kernel) in (1, 2), f"pooling over {len(kernel)} axes")
    window = window_of(g, op, value, kernel)
    op.need(set(window.dilations) == {1}, "an average over a dilated window")
    counted = bool(op.attribute("count_include_pad", 0))
    value, window, flat = _as_plane(g, value, window)
    if not counted and not window.fits_pooling:
        op.need(not op.attribute("ceil_mode", 0), "ceil_mode with uneven padding")
        pooled = _average_of_inside(g, value, window)
    else:
        value, pads = self_padded(g, value, window, 0.0)
        ceiling = bool(op.attribute("ceil_mode", 0))
        steps = list(window.kernel), list(window.strides), pads, ceiling, counted
        pooled = g.call(aten.avg_pool2d.default, value, *steps)
    return g.call(aten.squeeze.dims, pooled, [2]) if flat else pooled


def _average_of_inside(g: Builder, value: Value, window: Window) -> Any:
    """The mean of what lies inside of the input, for uneven padding: a quotient of two means."""
    ones = g.call(aten.full.default, [1, 1, *g.shape(value)[2:]], 1.0, dtype=g.dtype(value))
    means = []
    for part in (value, g.node(ones)):
        grown, pads = self_padded(g, part, window, 0.0)
        steps = list(window.kernel), list(window.strides), pads
        means.append(g.call(aten.avg_pool2d.default, grown, *steps))
    return g.call(aten.div.Tensor, *means)


def global_pool(g: Builder, op: Op) -> Result:
    """The mean or the largest value of each channel."""
    axes = list(range(2, g.rank(op[0])))
    target = aten.mean.dim if op.kind == "GlobalAveragePool" else aten.amax.default
    return g.call(target, op[0], axes, True)


def local_response(g: Builder, op: Op) -> Result:
    """Each value divided by a power of the squares of neighboring channels."""
    value, width = op[0], op.attribute("size")
    op.need(g.rank(value) == 4, "a local response over other than images")
    alpha, beta = op.attribute("alpha", 1e-4), op.attribute("beta", 0.75)
    squares = g.call(aten.unsqueeze.default, g.call(aten.mul.Tensor, value, value), 1)
    ends = (width - 1) // 2, width - 1 - (width - 1) // 2
    grown = padded(g, squares, [(0, 0), (0, 0), ends, (0, 0), (0, 0)])
    batch, channels, height, breadth = g.shape(value)
    total = None
    for place in range(width):
        end = g.integer(operator.add, channels, place)
        part = g.call(aten.slice.Tensor, grown, 2, place, end)
        total = part if total is None else g.call(aten.add.Tensor, total, part)
    total = g.call(aten.reshape.default, total, [batch, channels, height, breadth])
    scaled = g.call(aten.mul.Tensor, total, alpha / width)
    base = g.call(aten.add.Tensor, scaled, op.attribute("bias", 1.0))
    return g.call(aten.div.Tensor, value, g.call(aten.pow.Tensor_Scalar, base, beta))


TABLE: Table = MappingProxyType(
    {
        "AveragePool": average_pool,
        "Conv": convolution,
        "ConvTranspose": transposed_convolution,
        "GlobalAveragePool": global_pool,
        "GlobalMaxPool": global_pool,
        "LRN": local_response,
        "MaxPool": max_pool,
    }
)
"""ONNX operator -> builder."""
