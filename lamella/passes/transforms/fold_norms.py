"""Move the scale and bias of a norm into the linear layers behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.sites import FOLDED

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_LAYERS = (aten.linear.default, lam.grouped_linear.default)


@dataclass(frozen=True)
class FoldNorms(Transform):
    """Fold scale and bias of layer_norm and rms_norm into all linear layers that read them.

    With ``n`` the normalized value, ``W (g * n + b) + c = (W diag(g)) n + (W b + c)``. Products
    are computed in float64 and stored in the dtype of the weight. Afterwards the norm has no
    weight and no bias: one read of memory less per norm, a scale search that sees the real
    sizes of columns, and weights that can be rotated.

    A norm is folded only if *every* reader of its output is a linear layer, directly or through
    steps that leave the last axis alone (reshape, slices, choice of rows), and if no layer
    shares its weight with another reader (a head tied to the embedding). Other norms stay and
    are reported with the reader that is in the way.

    References:
        [Ashkboos2024], section 4, stage 1a.
    """

    name: ClassVar[str] = "fold-norms"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Fold norm by norm."""
        kept: list[str] = []
        for norm in graph.find(*_NORMS):
            if _affine(graph, norm) == (None, None):
                continue
            layers, obstacle = _layers_behind(graph, norm)
            if obstacle:
                kept.append(f"{norm.name} ({obstacle})")
            else:
                _fold(graph, norm, layers)
        if kept:
            analyses.remark(f"kept the scale of {len(kept)} norms: {', '.join(kept)}")


def _affine(graph: Graph, norm: Node) -> tuple[Node | None, Node | None]:
    """Scale and bias of a norm."""
    rms = norm.target is aten.rms_norm.default
    return graph.operand(norm, "weight"), None if rms else graph.operand(norm, "bias")


def _layers_behind(graph: Graph, norm: Node) -> tuple[list[Node], str]:
    """The layers that read `norm`, and what is in the way of folding, or nothing."""
    scale, bias = _affine(graph, norm)
    for operand in (scale, bias):
        if operand is not None and operand.op != "get_attr":
            return [], f"its scale is computed by {operand.name}"
    if len(graph.operand(norm, "normalized_shape")) != 1:
        return [], "it normalizes several axes"
    layers: list[Node] = []
    waiting = [norm]
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if _is_layer_of(user, value):
                layers.append(user)
            elif _keeps_last_axis(user, value):
                waiting.append(user)
            elif not ops.is_shape_arithmetic(user.target) or not _is_integer(user):
                return [], f"read by {user.name}"
    layers = list(dict.fromkeys(layers))
    return layers, _obstacle(graph, layers, bias)


def _obstacle(graph: Graph, layers: list[Node], norm_bias: Node | None) -> str:
    """Why the weights of `layers` can't take a scale, or nothing."""
    if not layers:
        return "nothing reads it"
    for layer in layers:
        weight = graph.operand(layer, "weight")
        if weight.op != "get_attr":
            return f"the weight of {layer.name} is computed"
        if not graph.is_loaded(weight):
            return f"weight {weight.target} is not in memory"
        others = [user for user in weight.users if user not in layers]
        if others:
            return f"weight {weight.target} is shared with {others[0].name}"
        if norm_bias is not None and layer.target is lam.grouped_linear.default:
            return f"{layer.name} has no bias to take that of the norm"
    return ""


def _fold(graph: Graph, norm: Node, layers: list[Node]) -> None:
    scale, bias = _affine(graph, norm)
    if bias is not None:
        for layer in layers:
            _add_to_bias(graph, layer, graph.weight(bias))
    weights = dict.fromkeys(graph.operand(layer, "weight") for layer in layers)
    if scale is not None:
        for weight in weights:
            value = graph.weight(weight)
            folded = value.double() * graph.weight(scale).double()
            graph.set_weight(weight, folded.to(value.dtype))
            weight.meta[FOLDED] = FoldNorms.name
    graph.set_operand(norm, "weight", None)
    if bias is not None:
        graph.set_operand(norm, "bias", None)


def _add_to_bias(graph: Graph, layer: Node, shift: Tensor) -> None:
    """``bias + W shift``, with the weight as it is before the scale is folded."""
    weight, old = graph.operand(layer, "weight"), graph.operand(layer, "bias")
    value = graph.weight(weight)
    total = torch.mv(value.double(), shift.double())
    if old is not None:
        total = total + graph.weight(old).double()
    total = total.to(value.dtype)
    if old is not None and list(old.users) == [layer]:
        graph.set_weight(old, total)
        old.meta[FOLDED] = FoldNorms.name
    else:
        stem = str(weight.target).removesuffix(".weight")
        name = f"{stem}.bias_of_{layer.name}"
        graph.set_operand(layer, "bias", graph.add_weight(name, total))


def _is_layer_of(user: Node, value: Node) -> bool:
    """Whether `user` is a linear layer whose input, and nothing else, is `value`."""
    if user.target not in _LAYERS:
        return False
    uses = [name for name, operand in ops.bind(user).items() if operand is value]
    return uses == ["input"]


def _keeps_last_axis(user: Node, value: Node) -> bool:
    """Whether `user` moves rows of `value` about and leaves each row as it is."""
    fake = value.meta["val"]
    after = user.meta.get("val")
    if not isinstance(after, Tensor) or after.ndim == 0 or fake.ndim == 0:
        return False
    if user.all_input_nodes[0] is not value or after.shape[-1] != fake.shape[-1]:
        return False
    bound, last = ops.bind(user), fake.ndim - 1
    if user.target in (aten.reshape.default, aten.clone.default, aten.expand.default):
        return True
    if user.target in (aten.slice.Tensor, aten.select.int, aten.index_select.default):
        return bound["dim"] % fake.ndim != last
    if user.target is aten.transpose.int:
        return last not in (bound["dim0"] % fake.ndim, bound["dim1"] % fake.ndim)
    if user.target is aten.permute.default:
        return bound["dims"][-1] % fake.ndim == last
    if user.target is aten.unsqueeze.default:
        return bound["dim"] % after.ndim != last + 1
    return user.target is aten.index.Tensor and len(bound["indices"]) <= last


def _is_integer(node: Node) -> bool:
    return not isinstance(node.meta.get("val"), Tensor)
