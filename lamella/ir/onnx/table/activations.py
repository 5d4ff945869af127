"""Activation functions and softmax."""

from __future__ import annotations

import math
from types import MappingProxyType

import torch
from torch.fx import Node

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.table.elementwise import unary
from lamella.ir.onnx.values import Op, Result, Table

aten = torch.ops.aten


def gelu(g: Builder, op: Op) -> Result:
    """GELU, exact or by tanh."""
    return g.call(aten.gelu.default, op[0], approximate=op.attribute("approximate", "none"))


def leaky_relu(g: Builder, op: Op) -> Result:
    """``x`` or ``alpha x``."""
    return g.call(aten.leaky_relu.default, op[0], op.attribute("alpha", 0.01))


def elu(g: Builder, op: Op) -> Result:
    """``x`` or ``alpha (exp(x) - 1)``."""
    return g.call(aten.elu.default, op[0], op.attribute("alpha", 1.0))


def selu(g: Builder, op: Op) -> Result:
    """``gamma x`` or ``gamma alpha (exp(x) - 1)``."""
    alpha = op.attribute("alpha", 1.6732632423543772)
    return g.call(aten.elu.default, op[0], alpha, op.attribute("gamma", 1.0507009873554805))


def celu(g: Builder, op: Op) -> Result:
    """``x`` or ``alpha (exp(x / alpha) - 1)``."""
    alpha = op.attribute("alpha", 1.0)
    return g.call(aten.elu.default, op[0], alpha, 1.0, 1.0 / alpha)


def hard_sigmoid(g: Builder, op: Op) -> Result:
    """``clip(alpha x + beta, 0, 1)``."""
    alpha, beta = op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return g.call(aten.hardsigmoid.default, op[0])
    line = g.call(aten.add.Tensor, g.call(aten.mul.Tensor, op[0], alpha), beta)
    return g.call(aten.clamp.default, line, 0.0, 1.0)


def swish(g: Builder, op: Op) -> Result:
    """``x sigmoid(alpha x)``."""
    alpha = op.attribute("alpha", 1.0 if op.kind == "Swish" else 1.702)
    if alpha == 1.0:
        return g.call(aten.silu.default, op[0])
    gate = g.call(aten.sigmoid.default, g.call(aten.mul.Tensor, op[0], alpha))
    return g.call(aten.mul.Tensor, op[0], gate)


def prelu(g: Builder, op: Op) -> Result:
    """``x`` or ``slope x``, with a slope per channel or of any shape that broadcasts."""
    x, slope = op[0], op[1]
    rank, slope_rank = g.rank(x), g.rank(slope)
    sizes = g.shape(slope)
    inner = sizes[:1] + (1,) * (rank - 2)
    if g.product(sizes) == 1 and g.is_constant(slope):
        return g.call(aten.prelu.default, x, g.call(aten.reshape.default, slope, [1]))
    if slope_rank == rank - 1 and sizes == inner and g.is_constant(slope):
        return g.call(aten.prelu.default, x, g.call(aten.reshape.default, slope, [sizes[0]]))
    positive = g.call(aten.gt.Scalar, x, 0.0)
    return g.call(aten.where.self, positive, x, g.call(aten.mul.Tensor, x, slope))


def thresholded_relu(g: Builder, op: Op) -> Result:
    """``x`` where it is larger than ``alpha``, else zero."""
    above = g.call(aten.gt.Scalar, op[0], op.attribute("alpha", 1.0))
    return g.call(aten.where.ScalarOther, above, op[0], 0.0)


def softsign(g: Builder, op: Op) -> Result:
    """``x / (1 + |x|)``."""
    return g.call(
        aten.div.Tensor, op[0], g.call(aten.add.Tensor, g.call(aten.abs.default, op[0]), 1.0)
    )


def clip(g: Builder, op: Op) -> Result:
    """Values moved into a range; either end may be missing."""
    x = op[0]
    ends = [op.optional(1), op.optional(2)]
    if all(end is None for end in ends):
        return x
    if not any(isinstance(end, Node) for end in ends):
        numbers = [None if end is None else g.number(end) for end in ends]
        if isinstance(x, Node) and numbers == [0.0, 6.0] and g.dtype(x).is_floating_point:
            return g.call(aten.hardtanh.default, x, 0.0, 6.0)
        return g.call(aten.clamp.default, x, *numbers)
    if ends[0] is not None:
        x = g.call(aten.maximum.default, x, ends[0])
    return x if ends[1] is None else g.call(aten.minimum.default, x, ends[1])


def softmax(g: Builder, op: Op) -> Result:
    """Softmax or its logarithm along one axis."""
    target = aten.softmax.int if op.kind == "Softmax" else aten.log_softmax.int
    return g.call(target, op[0], g.axis(op[0], op.attribute("axis", -1)))


TABLE: Table = MappingProxyType(
    {
        "Celu": celu,
        "Clip": clip,
        "Elu": elu,
        "Gelu": gelu,
        "HardSigmoid": hard_sigmoid,
        "HardSwish": unary(aten.hardswish.default),
        "LeakyRelu": leaky_relu,
        "LogSoftmax": softmax,
        "Mish": unary(aten.mish.default),
        "PRelu": prelu,
        "Relu": unary(aten.relu.default),
        "Selu": selu,
        "Sigmoid": unary(aten.sigmoid.default),
        "Softmax": softmax,
        "Softplus": unary(aten.softplus.default),
        "Softsign": softsign,
        "Swish": swish,
        "Tanh": unary(aten.tanh.default),
        "ThresholdedRelu": thresholded_relu,
    }
)
"""ONNX operator -> builder."""
