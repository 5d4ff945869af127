"""A residual sum and the norm of it in one operator, which walks over the stream once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from lamella.backends.onnxruntime.emission import MICROSOFT, Call, Emission, Emitter
from lamella.backends.onnxruntime.extents import same_size
from lamella.ir import ops

aten = torch.ops.aten


def plan(e: Emission, emitters: Mapping[Callable[..., Any], Emitter]) -> dict[Node, Emitter]:
    """The sums that an RMS norm reads, and these norms."""
    del emitters
    if not e.options.contrib:
        return {}
    found: dict[Node, Emitter] = {}
    for node in e.graph.nodes:
        norm = _norm_of(node) if node.target is aten.add.Tensor else None
        if norm is not None:
            found[node] = _sum_with(norm)
            found[norm] = _given
    return found


def _norm_of(add: Node) -> Node | None:
    """The norm that can be computed with a sum."""
    bound, out = ops.bind(add), add.meta["val"]
    operands = [bound["self"], bound["other"]]
    if bound["alpha"] != 1 or out.dtype != torch.float32 or out.ndim != 3:
        return None
    if not all(isinstance(x, Node) and _alike(x.meta["val"], out) for x in operands):
        return None
    return next((user for user in add.users if _is_norm(user, out)), None)


def _is_norm(user: Node, out: Tensor) -> bool:
    if user.target is not aten.rms_norm.default:
        return False
    weight, shape = ops.bind(user)["weight"], ops.bind(user)["normalized_shape"]
    fits = len(shape) == 1 and same_size(shape[0], out.shape[-1])
    return fits and weight is not None and weight.meta["val"].dtype == out.dtype


def _alike(value: object, out: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.dtype != out.dtype or value.ndim != out.ndim:
        return False
    return all(map(same_size, value.shape, out.shape))


def _sum_with(norm: Node) -> Emitter:
    def emit(e: Emission, call: Call) -> ir.Value:
        of_norm = Call.of(norm)
        eps = torch.finfo(call.out.dtype).eps if of_norm["eps"] is None else of_norm["eps"]
        inputs = [e.tensor(call["self"]), e.tensor(call["other"]), e.tensor(of_norm["weight"])]
        normed, mean, deviation, total = e.add(
            "SkipSimplifiedLayerNormalization",
            inputs,
            {"epsilon": float(eps)},
            domain=MICROSOFT,
            outputs=4,
        )
        # Without a name they are not computed.
        mean.name = deviation.name = ""
        e.values[norm] = normed
        return total

    return emit


def _given(e: Emission, call: Call) -> ir.Value:
    """The norm was written with the sum."""
    value = e.values[call.node]
    assert isinstance(value, ir.Value)
    return value
