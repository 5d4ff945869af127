"""Which values are never negative, whatever the inputs: by dataflow from the operators.

The inputs of most layers of a convolutional network are: they come from a relu, perhaps through
pooling. Rules that treat positive and negative contributions apart need fewer products then.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from lamella.ir.ops import aten, bind

_MAKING = frozenset(
    {
        *(aten.relu.default, aten.sigmoid.default, aten.hardsigmoid.default, aten.softmax.int),
        *(aten.exp.default, aten.abs.default, aten.square.default, aten.softplus.default),
        *(aten.linalg_vector_norm.default, aten.sqrt.default),
    }
)
"""Operators whose results are never negative."""

_KEEPING = frozenset(
    {
        *(aten.max_pool2d.default, aten.max_pool2d_with_indices.default, aten.avg_pool2d.default),
        *(aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default),
        *(aten.avg_pool1d.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec),
        *(aten.reshape.default, aten.transpose.int, aten.permute.default, aten.clone.default),
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default),
        *(aten.slice.Tensor, aten.select.int, aten.cat.default, aten.stack.default),
        *(aten.split_with_sizes.default, aten.roll.default, aten.flip.default, operator.getitem),
        *(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default),
        *(aten.add.Tensor, aten.mul.Tensor, aten.to.dtype, aten.maximum.default),
    }
)
"""Operators whose results are never negative where no operand is."""


def is_nonnegative(value: Any) -> bool:
    """Whether no entry of `value` can be below zero; numbers are looked at as they are."""
    if not isinstance(value, Node):
        return isinstance(value, int | float) and value >= 0
    if value.op != "call_function":
        return False
    if value.target in _MAKING:
        return True
    if value.target in (aten.clamp.default, aten.hardtanh.default):
        lowest = bind(value).get("min", bind(value).get("min_val"))
        return isinstance(lowest, int | float) and lowest >= 0
    if value.target in (aten.add.Tensor, aten.mul.Tensor, aten.maximum.default):
        bound = bind(value)
        return bound.get("alpha", 1) == 1 and all(map(is_nonnegative, value.args[:2]))
    operands = [one for one in value.all_input_nodes if _is_value(one)]
    return value.target in _KEEPING and all(map(is_nonnegative, operands))


def feeds_only_relu(node: Node) -> bool:
    """Whether nothing but relus reads a value, so that only positive entries have relevance."""
    return bool(node.users) and all(user.target is aten.relu.default for user in node.users)


def _is_value(node: Node) -> bool:
    """Whether a node is a tensor, and no size."""
    return hasattr(node.meta.get("val"), "shape") or isinstance(node.meta.get("val"), tuple | list)
