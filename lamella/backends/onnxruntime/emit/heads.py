"""Heads side by side, as projections write them and as attention takes them.

A model cuts ``[batch, sequence, heads * width]`` into heads, moves the heads before the
sequence, norms and rotates them, and attends. All of that but the attention works on each
position alone, so that it can be written without moving anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call, Emission
from lamella.backends.onnxruntime.emit.normalization import layer_norm_of, rms_norm_of
from lamella.backends.onnxruntime.emit.rotary import rotary_caches
from lamella.backends.onnxruntime.extents import is_fixed, same_size

aten = torch.ops.aten
lam = torch.ops.lamella


_NORMS: Mapping[Any, Callable[[Emission, Call, ir.Value], ir.Value]] = MappingProxyType(
    {aten.rms_norm.default: rms_norm_of, aten.layer_norm.default: layer_norm_of}
)


def heads_joined(e: Emission, node: Node) -> ir.Value | None:
    """``[batch, heads, sequence, width]`` as ``[batch, sequence, heads * width]``.

    None if that takes a transposition.
    """
    key = (node, "joined heads")
    if key in e.views:
        return e.views[key]
    held = node.meta["val"]
    if held.ndim != 4 or not (is_fixed(held.shape[1]) and is_fixed(held.shape[3])):
        return None
    if node.target is lam.rotary_embedding.default:
        value = _rotated(e, node)
    else:
        value = _uncut(e, node) or _joined(e, node)
    if value is not None:
        e.views[key] = value
    return value


def _rotated(e: Emission, node: Node) -> ir.Value | None:
    call = Call.of(node)
    caches = rotary_caches(e, call)
    joined = None if caches is None else heads_joined(e, call["input"])
    if joined is None or caches is None:
        return None
    return e.op("RotaryEmbedding", joined, *caches, num_heads=int(call.out.shape[1]))


def _uncut(e: Emission, node: Node) -> ir.Value | None:
    """What was cut into heads, when nothing else was done to it."""
    source = _moved(node)
    if source is None or source.target is not aten.reshape.default:
        return None
    before = source.args[0]
    assert isinstance(before, Node)
    sizes = before.meta["val"].shape
    alike = len(sizes) == 3 and all(map(same_size, sizes[:2], source.meta["val"].shape[:2]))
    return e.tensor(before) if alike else None


def _joined(e: Emission, node: Node) -> ir.Value | None:
    apart = _apart(e, node)
    if apart is None:
        return None
    _, heads, _, width = node.meta["val"].shape
    return e.op("Reshape", apart, e.ints(0, 0, int(heads) * int(width)))


def _apart(e: Emission, node: Node) -> ir.Value | None:
    """``[batch, sequence, heads, width]``: before the heads were moved, with norms of a head."""
    source = _moved(node)
    if source is not None:
        return e.tensor(source)
    norm = _NORMS.get(node.target)
    if norm is None or len(Call.of(node)["normalized_shape"]) != 1:
        return None
    x = _apart(e, Call.of(node)["input"])
    return None if x is None else norm(e, Call.of(node), x)


def _moved(node: Node) -> Node | None:
    """The operand of a transposition of heads and sequence."""
    if node.target is not aten.transpose.int or node.meta["val"].ndim != 4:
        return None
    call = Call.of(node)
    return call["self"] if {call.axis("dim0"), call.axis("dim1")} == {1, 2} else None
