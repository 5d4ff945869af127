"""Normalizations."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.values import Op, Result, Table, Value

aten = torch.ops.aten


def batch_norm(g: Builder, op: Op) -> Result:
    """Channels scaled and shifted by running statistics."""
    op.need(not op.attribute("training_mode", 0), "batch normalization in training mode")
    value, scale, bias, mean, variance = (op[place] for place in range(5))
    momentum, epsilon = 1.0 - op.attribute("momentum", 0.9), op.attribute("epsilon", 1e-5)
    rest = (False, momentum, epsilon, False)
    return g.call(aten.batch_norm.default, value, scale, bias, mean, variance, *rest)


def instance_norm(g: Builder, op: Op) -> Result:
    """Each channel of each sample normalized: groups of one channel."""
    channels = g.static(op[0], 1)
    op.need(channels is not None, "a dynamic number of channels")
    epsilon = op.attribute("epsilon", 1e-5)
    return g.call(aten.group_norm.default, op[0], channels, op[1], op[2], epsilon, False)


def group_norm(g: Builder, op: Op) -> Result:
    """Groups of channels normalized; before opset 21 scale and bias are per group."""
    value, scale, bias, groups = op[0], op[1], op[2], op.attribute("num_groups")
    if op.version < 21:
        channels = g.static(value, 1)
        op.need(channels is not None, "a dynamic number of channels")
        each = (channels or 1) // groups
        scale, bias = (
            g.call(aten.repeat_interleave.self_int, part, each) for part in (scale, bias)
        )
    epsilon = op.attribute("epsilon", 1e-5)
    return g.call(aten.group_norm.default, value, groups, scale, bias, epsilon, False)


def layer_norm(g: Builder, op: Op) -> Result:
    """The last axes normalized, then scaled and shifted; also mean and deviation if read."""
    value, scale, bias = op[0], op[1], op.optional(2)
    axis, epsilon = g.axis(value, op.attribute("axis", -1)), op.attribute("epsilon", 1e-5)
    result = normalized(g, (value, scale, bias), axis, epsilon)
    if not (op.wants(1) or op.wants(2)):
        return result
    axes = list(range(axis, g.rank(value)))
    mean = g.call(aten.mean.dim, value, axes, True)
    centered = g.call(aten.sub.Tensor, value, mean)
    square = g.call(aten.mean.dim, g.call(aten.mul.Tensor, centered, centered), axes, True)
    deviation = g.call(aten.rsqrt.default, g.call(aten.add.Tensor, square, epsilon))
    return result, mean, deviation


def normalized(
    g: Builder, parts: tuple[Value, Value, Value | None], axis: int, epsilon: float
) -> Any:
    """The layer norm of ``(value, scale, bias)`` over the axes from `axis` on."""
    value, scale, bias = parts
    sizes = list(g.shape(value)[axis:])
    if all(g.shape(part) == tuple(sizes) for part in (scale, bias) if part is not None):
        return g.call(aten.layer_norm.default, value, sizes, scale, bias, epsilon, False)
    plain = g.call(aten.layer_norm.default, value, sizes, None, None, epsilon, False)
    scaled = g.call(aten.mul.Tensor, plain, scale)
    return scaled if bias is None else g.call(aten.add.Tensor, scaled, bias)


def rms_norm(g: Builder, op: Op) -> Result:
    """The last axes divided by their root mean square, then scaled."""
    op.need(not op.wants(1), "the reciprocal of the root mean square as an output")
    value = op[0]
    axis, epsilon = g.axis(value, op.attribute("axis", -1)), op.attribute("epsilon", 1e-5)
    return root_mean_square(g, value, op[1], axis, epsilon)


def root_mean_square(g: Builder, value: Value, scale: Value, axis: int, epsilon: float) -> Any:
    """The RMS norm over the axes from `axis` on."""
    sizes = list(g.shape(value)[axis:])
    if g.shape(scale) == tuple(sizes):
        return g.call(aten.rms_norm.default, value, sizes, scale, epsilon)
    plain = g.call(aten.rms_norm.default, value, sizes, None, epsilon)
    return g.call(aten.mul.Tensor, plain, scale)


def lp_norm(g: Builder, op: Op) -> Result:
    """Vectors along an axis divided by their length; a vector of zeros stays one."""
    value, axis = op[0], g.axis(op[0], op.attribute("axis", -1))
    length = g.call(aten.linalg_vector_norm.default, value, op.attribute("p", 2), [axis], True)
    empty = g.call(aten.eq.Scalar, length, 0.0)
    return g.call(aten.div.Tensor, value, g.call(aten.where.ScalarSelf, empty, 1.0, length))


def mean_variance(g: Builder, op: Op) -> Result:
    """The mean taken away, divided by the deviation."""
    value, axes = op[0], list(op.attribute("axes") or (0, 2, 3))
    mean = g.call(aten.mean.dim, value, axes, True)
    centered = g.call(aten.sub.Tensor, value, mean)
    square = g.call(aten.mean.dim, g.call(aten.mul.Tensor, centered, centered), axes, True)
    deviation = g.call(aten.add.Tensor, g.call(aten.sqrt.default, square), 1e-9)
    return g.call(aten.div.Tensor, centered, deviation)


TABLE: Table = MappingProxyType(
    {
        "BatchNormalization": batch_norm,
        "GroupNormalization": group_norm,
        "InstanceNormalization": instance_norm,
        "LayerNormalization": layer_norm,
        "LpNormalization": lp_norm,
        "MeanVarianceNormalization": mean_variance,
        "RMSNormalization": rms_norm,
        # ONNX Runtime has it in the default domain too.
        "SimplifiedLayerNormalization": rms_norm,
    }
)
"""ONNX operator -> builder."""
