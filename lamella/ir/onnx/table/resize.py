"""Resizing images."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.values import Constant, Integer, Op, Result, Table, Value

aten = torch.ops.aten


def resize(g: Builder, op: Op) -> Result:
    """An image in another size, by the modes that PyTorch has too, or by nearest in any mode."""
    value = op[0]
    op.need(not op.attribute("antialias", 0), "antialiasing")
    policy = op.attribute("keep_aspect_ratio_policy", "stretch")
    op.need(policy == "stretch", f"keep_aspect_ratio_policy {policy!r}")
    axes = [g.axis(value, axis) for axis in op.attribute("axes") or range(g.rank(value))]
    scales = _scales(g, op)
    given = op.optional(3)
    if given is not None:
        sizes = list(g.integers(given))
    else:
        sizes = [_scaled(g, op, g.shape(value)[a], s) for a, s in zip(axes, scales, strict=True)]
    target, factors = list(g.shape(value)), [1.0] * g.rank(value)
    for place, axis in enumerate(axes):
        target[axis] = sizes[place]
        factors[axis] = scales[place] if scales else 0.0
    planar = all(g.equal(a, b) for a, b in zip(g.shape(value)[:2], target[:2], strict=True))
    if g.rank(value) == 4 and planar and _is_pytorch_mode(op, target[2:], factors[2:]):
        return _by_pytorch(g, op, value, (target[2:], factors[2:]))
    op.need(op.attribute("mode", "nearest") == "nearest", _describe(op))
    return _nearest(g, op, value, (target, factors))


def _describe(op: Op) -> str:
    mode = op.attribute("mode", "nearest")
    how = op.attribute("coordinate_transformation_mode", "half_pixel")
    return f"mode {mode!r} with coordinates {how!r}"


def _scales(g: Builder, op: Op) -> list[float]:
    given = op.optional(2)
    return [] if given is None else [float(number) for number in g.constant(given).tensor.tolist()]


def _scaled(g: Builder, op: Op, size: Integer, scale: float) -> Integer:
    """A size times a scale, cut; along a dynamic axis for whole scales and their inverses."""
    if isinstance(size, int):
        return math.floor(size * scale)
    if scale >= 1 and scale.is_integer():
        return g.integer(operator.mul, size, int(scale))
    inverse = 1 / scale if scale else math.nan
    op.need(inverse.is_integer(), f"a scale of {scale} along a dynamic axis")
    return g.integer(operator.floordiv, size, int(inverse))


def _is_pytorch_mode(op: Op, sizes: list[Integer], factors: list[float]) -> bool:
    """Whether PyTorch computes the same coordinates."""
    mode = op.attribute("mode", "nearest")
    how = op.attribute("coordinate_transformation_mode", "half_pixel")
    if mode == "nearest":
        rounding = op.attribute("nearest_mode", "round_prefer_floor")
        if how == "asymmetric" and rounding == "floor":
            return True
        whole = all(factor >= 1 and factor.is_integer() for factor in factors)
        return whole and how == "half_pixel" and rounding == "round_prefer_floor"
    # PyTorch treats a single element differently, and rounds sizes before it aligns corners.
    odd = how == "pytorch_half_pixel" and 1 in sizes
    odd = odd or (how == "align_corners" and not all(factor.is_integer() for factor in factors))
    if odd or how not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return False
    plain = op.attribute("cubic_coeff_a", -0.75) == -0.75 and not op.attribute("exclude_outside", 0)
    return mode == "linear" or (mode == "cubic" and plain)


def _by_pytorch(g: Builder, op: Op, value: Value, target: tuple[list[Integer], list[float]]) -> Any:
    sizes, factors = target
    # PyTorch takes the size or the factors; the size is enough where it is exactly the factor.
    inputs = g.shape(value)[2:]
    exact = all(
        not factor or factor.is_integer() or (isinstance(size, int) and size * factor % 1 == 0)
        for size, factor in zip(inputs, factors, strict=True)
    )
    how = (sizes, None) if exact else (None, factors)
    mode = op.attribute("mode", "nearest")
    if mode == "nearest":
        return g.call(aten.upsample_nearest2d.vec, value, *how)
    corners = op.attribute("coordinate_transformation_mode", "half_pixel") == "align_corners"
    kernel = aten.upsample_bilinear2d.vec if mode == "linear" else aten.upsample_bicubic2d.vec
    return g.call(kernel, value, how[0], corners, how[1])


Place = Callable[[float, float, int, int], float]

_COORDINATES: Mapping[str, Place] = {
    # Place in the result, scale, size before, size after -> place in the input.
    "half_pixel": lambda x, scale, old, new: (x + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda x, scale, old, new: (x + 0.5) / scale - 0.5 if new > 1 else 0.0,
    "asymmetric": lambda x, scale, old, new: x / scale,
    "align_corners": lambda x, scale, old, new: x * (old - 1) / (new - 1) if new > 1 else 0.0,
}

_ROUND: Mapping[str, Callable[[float], int]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round_prefer_floor": lambda x: math.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: math.floor(x + 0.5),
}


def _nearest(g: Builder, op: Op, value: Value, target: tuple[list[Integer], list[float]]) -> Value:
    """The nearest elements picked by index, axis by axis; needs sizes that are known."""
    how = op.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = op.attribute("nearest_mode", "round_prefer_floor")
    op.need(how in _COORDINATES and rounding in _ROUND, _describe(op))
    for axis, (new, factor) in enumerate(zip(*target, strict=True)):
        old = g.shape(value)[axis]
        if g.equal(old, new):
            continue
        if not isinstance(old, int) or not isinstance(new, int):
            op.need(False, f"{_describe(op)} along a dynamic axis")
            continue
        scale = factor or new / old
        places = [_ROUND[rounding](_COORDINATES[how](x, scale, old, new)) for x in range(new)]
        inside = torch.tensor([min(max(place, 0), old - 1) for place in places])
        value = g.call(aten.index_select.default, value, axis, Constant(inside))
    return value


TABLE: Table = MappingProxyType({"Resize": resize})
"""ONNX operator -> builder."""
