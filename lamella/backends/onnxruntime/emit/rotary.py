"""Rotary embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.extents import is_fixed, same_size
from lamella.ir import ops

aten = torch.ops.aten
lam = torch.ops.lamella


def rotary_embedding(e: Emission, call: Call) -> ir.Value:
    """``input * cos + rotated(input) * sin``."""
    caches = rotary_caches(e, call) if call.out.ndim == 4 else None
    if caches is not None:
        return e.op("RotaryEmbedding", e.tensor(call["input"]), *caches)
    x, width, rank = e.tensor(call["input"]), int(call.out.shape[-1]), call.out.ndim
    if call["interleaved"]:
        pairs = e.op("Reshape", x, e.dims([*[0] * (rank - 1), width // 2, 2]))
        first, second = e.add("Split", (pairs,), {"axis": -1, "num_outputs": 2}, outputs=2)
        swapped = e.op("Concat", e.op("Neg", second), first, axis=-1)
        rotated = e.op("Reshape", swapped, e.ints(*[0] * (rank - 1), width))
    else:
        first, second = e.add("Split", (x,), {"axis": -1, "num_outputs": 2}, outputs=2)
        rotated = e.op("Concat", e.op("Neg", second), first, axis=-1)
    straight = e.op("Mul", x, e.tensor(call["cos"]))
    return e.op("Add", straight, e.op("Mul", rotated, e.tensor(call["sin"])))


def rotary_caches(e: Emission, call: Call) -> tuple[ir.Value, ...] | None:
    """Cosines, sines (and positions) as `RotaryEmbedding` takes them.

    It takes one half of the channels, so both halves must be provably equal; and a table for
    each sample, or one table and a position for each token.
    """
    if e.options.opset < 23 or call["interleaved"]:
        return None
    cos, sin = call["cos"], call["sin"]
    x, held = call.fake("input"), call.fake("cos")
    fits = (
        held.ndim == 4
        and is_fixed(held.shape[1])
        and held.shape[1] == 1
        and same_size(held.shape[2], x.shape[2])
        and same_size(held.shape[3], x.shape[3])
        and all(map(same_size, held.shape, call.fake("sin").shape))
    )
    if not fits or not (has_equal_halves(cos) and has_equal_halves(sin)):
        return None
    lone = is_fixed(held.shape[0]) and held.shape[0] == 1
    if not lone and not same_size(held.shape[0], x.shape[0]):
        return None
    axes = (0, 1) if lone else (1,)
    tables = tuple(_half(e, node, int(x.shape[3]) // 2, axes) for node in (cos, sin))
    return (*tables, _positions(e, call)) if lone else tables


def _half(e: Emission, node: Node, width: int, axes: Sequence[int]) -> ir.Value:
    key = (node, f"half without {axes}")
    if key not in e.views:
        half = e.op("Slice", e.tensor(node), e.ints(0), e.ints(width), e.ints(3))
        e.views[key] = e.op("Squeeze", half, e.ints(*axes))
    return e.views[key]


def _positions(e: Emission, call: Call) -> ir.Value:
    """``0, 1, ...`` for each sample: one row of the table per token."""
    key = (call["cos"], f"positions {call.out.shape[0]}")
    if key not in e.views:
        length = e.op("Squeeze", e.size(call["input"], 2), e.ints(0))
        row = e.op("Range", e.scalar(0), length, e.scalar(1))
        shape = e.op("Concat", e.size(call["input"], 0), e.ints(1), axis=0)
        e.views[key] = e.op("Expand", row, shape)
    return e.views[key]


_KEEPS_HALVES = frozenset(
    {
        aten.cos.default,
        aten.sin.default,
        aten.unsqueeze.default,
        aten.to.dtype,
        aten.clone.default,
        aten.expand.default,
    }
)


def has_equal_halves(node: Any) -> bool:
    """Whether the last axis of a value is something twice in a row, by how it was made."""
    while isinstance(node, Node):
        if node.target is aten.cat.default:
            call = Call.of(node)
            parts, rank = call["tensors"], call.out.ndim
            return len(parts) == 2 and parts[0] is parts[1] and call["dim"] % rank == rank - 1
        if node.target is aten.mul.Tensor and not isinstance(node.args[1], Node):
            node = node.args[0]
        elif node.target in _KEEPS_HALVES:
            if node.target is aten.unsqueeze.default and _adds_last_axis(node):
                return False
            node = node.args[0]
        else:
            return False
    return False


def _adds_last_axis(node: Node) -> bool:
    rank = node.meta["val"].ndim
    return ops.bind(node)["dim"] % rank == rank - 1


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {lam.rotary_embedding.default: rotary_embedding}
)
"""Operator -> emitter."""
