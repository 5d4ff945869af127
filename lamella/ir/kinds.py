"""What a branch of the residual stream does, by the operators in it: attention, MLP and others.

The rules work on canonical operators and on the operators of a freshly captured graph alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Node

from lamella.ir.reach import Reach, base_name

ATTENTION = "attention"
CROSS_ATTENTION = "cross-attention"
MLP = "mlp"
MOE = "moe"
CONV = "conv"
SSM = "ssm"
LINEAR = "linear"

CHANNEL_MIXERS = frozenset({MLP, MOE, LINEAR})
"""The kinds that treat every position of a sequence by itself."""

CONVOLUTIONS = frozenset(
    {"conv1d", "conv2d", "conv3d", "convolution", "_convolution"}
    | {"conv_transpose1d", "conv_transpose2d", "conv_int8"}
)
_ATTENTIONS = frozenset({"scaled_dot_product_attention", "cached_attention"})
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
_EXPERTS = frozenset({"grouped_linear", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"})
_LINEAR = frozenset({"linear", "linear_nbits", "linear_int8", "linear_int8_static", "mm", "addmm"})
LAYERS = _LINEAR | CONVOLUTIONS | _EXPERTS
"""Operators that multiply by a weight."""

CONTRACTIONS = LAYERS | _ATTENTIONS | _PRODUCTS
"""Operators that sum over an axis of a weight or of two activations."""

NONLINEAR = frozenset(
    {"relu", "gelu", "silu", "tanh", "sigmoid", "elu", "celu", "selu", "leaky_relu", "prelu"}
    | {"hardtanh", "hardswish", "hardsigmoid", "mish", "softplus", "erf", "exp", "relu6"}
    | {"softmax", "_softmax", "log_softmax", "maximum", "minimum", "clamp", "abs"}
)
"""Operators that bend; a path without one of them is linear up to its norms."""

_ROUTING = frozenset({"topk", "sort", "histc", "grouped_linear"}) | _EXPERTS
_SCANS = frozenset({"selective_scan", "cached_selective_scan", "head_scan", "cached_head_scan"})
_SUMS = frozenset({"cumsum"})
_SOFTMAX = frozenset({"softmax", "_softmax"})


class Kinds:
    """Classifies regions of one graph; a region is a set of nodes as `Reach` writes them."""

    def __init__(self, reach: Reach) -> None:
        """Sort the nodes of the graph by what they do."""
        self._reach = reach
        names = [base_name(node) for node in reach.nodes]

        def mask(wanted: Callable[[Node, str], bool]) -> int:
            pairs = zip(reach.nodes, names, strict=True)
            return reach.set_of(node for node, name in pairs if wanted(node, name))

        self.contractions = mask(lambda _, name: name in CONTRACTIONS)
        self.nonlinear = mask(lambda _, name: name in NONLINEAR)
        self._attentions = mask(lambda _, name: name in _ATTENTIONS)
        self._softmaxes = mask(lambda _, name: name in _SOFTMAX)
        self._products = mask(lambda node, name: name in _PRODUCTS and _of_activations(node))
        self._routing = mask(lambda _, name: name in _ROUTING)
        self._scans = mask(lambda _, name: name in _SCANS)
        self._sums = mask(lambda node, name: name in _SUMS and _is_float(node))
        self._spatial = mask(lambda node, name: name in CONVOLUTIONS and not _is_pointwise(node))

    def of(self, region: int, entry: Node) -> str:
        """The kind of the branch whose nodes are `region` and which starts at `entry`."""
        attended = self._attended(region)
        if attended:
            inside = self._reach.descendants(entry) | self._reach.bit(entry)
            own = any(operands & ~inside == 0 for operands in attended)
            return ATTENTION if own else CROSS_ATTENTION
        if region & self._routing:
            return MOE
        if region & (self._scans | self._sums):
            return SSM
        if region & self._products:
            return ATTENTION
        if region & self._spatial:
            return CONV
        several = (region & self.contractions).bit_count() >= 2
        return MLP if several and region & self.nonlinear else LINEAR

    def _attended(self, region: int) -> list[int]:
        """For every attention in `region` the set of values whose scores it computes.

        An attention in pieces is a softmax below a product of two activations. There may be
        several products (content and position); self-attention has one whose operands both
        come from the stream.
        """
        reach = self._reach
        fused = reach.members(region & self._attentions)
        found = [reach.bit(_argument(node, 1, "key")) for node in fused]
        for softmax in reach.members(region & self._softmaxes):
            for product in reach.members(reach.ancestors(softmax) & region & self._products):
                found.append(reach.set_of(_tensor_operands(product)[-2:]))
        return found


def is_normalization(node: Node) -> bool:
    """Whether `node` is a norm in one piece."""
    return base_name(node) in {"layer_norm", "rms_norm", "group_norm", "batch_norm"}


def _of_activations(node: Node) -> bool:
    return all(operand.op != "get_attr" for operand in _tensor_operands(node))


def _tensor_operands(node: Node) -> list[Node]:
    found: list[Node] = []
    for argument in node.args:
        items: Any = argument if isinstance(argument, list | tuple) else [argument]
        found += [item for item in items if isinstance(item, Node) and _is_tensor(item)]
    return found


def _argument(node: Node, position: int, name: str) -> Node:
    found = node.args[position] if len(node.args) > position else node.kwargs[name]
    assert isinstance(found, Node)
    return found


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _is_pointwise(node: Node) -> bool:
    """Whether a convolution looks at one position only: a linear layer in disguise."""
    weight = _argument(node, 1, "weight").meta.get("val")
    return isinstance(weight, Tensor) and all(size == 1 for size in weight.shape[2:])
