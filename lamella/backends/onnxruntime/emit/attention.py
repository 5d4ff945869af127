"""Attention and rotary embedding.

From opset 23 on both are standard operators, with the semantics of PyTorch (broadcast masks,
rows without a key are zero, grouped queries, causal from the upper left), and faster in ONNX
Runtime than `com.microsoft.MultiHeadAttention` (measured, see `benchmarks/onnx_writer.py`).
They also take heads side by side, ``[batch, sequence, heads * width]``, as the projections
write them, so that no transposition is left.
"""

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


def attention(e: Emission, call: Call) -> ir.Value:
    """Scaled dot-product attention."""
    rank = call.out.ndim
    if e.options.opset < 23 or rank not in (3, 4):
        return _written_out(e, call)
    attributes: dict[str, Any] = {"is_causal": int(call["is_causal"])}
    if call["scale"] is not None:
        attributes["scale"] = float(call["scale"])
    names = ("query", "key", "value")
    mask = _full_mask(e, call)
    joined = [heads_joined(e, call[name]) for name in names] if rank == 4 else [None]
    if all(value is not None for value in joined):
        attributes["q_num_heads"] = int(call.fake("query").shape[1])
        attributes["kv_num_heads"] = int(call.fake("key").shape[1])
        result = e.op("Attention", *joined, mask, **attributes)
        e.views[call.node, "joined heads"] = result
        heads, width = int(call.out.shape[1]), int(call.out.shape[3])
        split = e.op("Reshape", result, e.ints(0, 0, heads, width))
        return e.op("Transpose", split, perm=[0, 2, 1, 3])
    values = [e.tensor(call[name]) for name in names]
    if rank == 4:
        return e.op("Attention", *values, mask, **attributes)
    values = [e.op("Unsqueeze", value, e.ints(0)) for value in values]
    return e.op("Squeeze", e.op("Attention", *values, mask, **attributes), e.ints(0))


def _full_mask(e: Emission, call: Call) -> ir.Value | None:
    """The mask with the axes of queries and keys in full; others may be 1."""
    node = call["attn_mask"]
    if node is None:
        return None
    held, query = node.meta["val"], call.fake("query")
    dtype = torch.bool if held.dtype == torch.bool else query.dtype
    lengths = (query.shape[-2], call.fake("key").shape[-2])
    if all(map(same_size, held.shape[-2:], lengths)):
        return e.tensor(node, dtype)
    key = (node, f"full mask {lengths} {dtype}")
    if key not in e.views:
        shape = e.op("Concat", e.size(call["query"], -2), e.size(call["key"], -2), axis=0)
        e.views[key] = e.op("Expand", e.tensor(node, dtype), shape)
    return e.views[key]


def heads_joined(e: Emission, node: Node) -> ir.Value | None:
    """``[batch, heads, sequence, width]`` as ``[batch, sequence, heads * width]``.

    None if that takes a transposition.
    """
    key = (node, "joined heads")
    if key not in e.views:
        value = None
        if node.target is aten.transpose.int and node.meta["val"].ndim == 4:
            value = _joined_before_transpose(e, node)
        elif node.target is lam.rotary_embedding.default:
            value = _joined_rotary(e, node)
        if value is None:
            return None
        e.views[key] = value
    return e.views[key]


def _joined_before_transpose(e: Emission, node: Node) -> ir.Value | None:
    call = Call.of(node)
    source = call["self"]
    held = source.meta["val"]
    heads, width = held.shape[2:]
    if {call.axis("dim0"), call.axis("dim1")} != {1, 2} or not (
        is_fixed(heads) and is_fixed(width)
    ):
        return None
    if source.target is aten.reshape.default:
        before = source.args[0]
        sizes = before.meta["val"].shape
        if len(sizes) == 3 and all(map(same_size, sizes[:2], held.shape[:2])):
            return e.tensor(before)
    return e.op("Reshape", e.tensor(source), e.ints(0, 0, int(heads) * int(width)))


def _joined_rotary(e: Emission, node: Node) -> ir.Value | None:
    call = Call.of(node)
    heads = call.out.shape[1]
    caches = _caches(e, call) if call.out.ndim == 4 and is_fixed(heads) else None
    joined = None if caches is None else heads_joined(e, call["input"])
    if joined is None or caches is None:
        return None
    return e.op("RotaryEmbedding", joined, *caches, num_heads=int(heads))


def rotary_embedding(e: Emission, call: Call) -> ir.Value:
    """``input * cos + rotated(input) * sin``."""
    caches = _caches(e, call) if call.out.ndim == 4 else None
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


def _caches(e: Emission, call: Call) -> tuple[ir.Value, ...] | None:
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


def _written_out(e: Emission, call: Call) -> ir.Value:
    """Attention in products and a softmax; a row without a key gives zeros, as in PyTorch."""
    dtype, rank = call.out.dtype, call.out.ndim
    query, key, value = (e.tensor(call[name]) for name in ("query", "key", "value"))
    if call["enable_gqa"]:
        groups = int(call.fake("query").shape[-3]) // int(call.fake("key").shape[-3])
        key, value = (_repeated(e, x, groups, rank) for x in (key, value))
    width = int(call.fake("query").shape[-1])
    scale = width**-0.5 if call["scale"] is None else float(call["scale"])
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    turned = e.op("Transpose", key, perm=swapped)
    scores = e.op("MatMul", e.op("Mul", query, e.const(scale, dtype)), turned)
    bias = _bias(e, call)
    if bias is None:
        return e.op("MatMul", e.op("Softmax", scores, axis=-1), value)
    probabilities = e.op("Softmax", e.op("Add", scores, bias), axis=-1)
    lowest = e.const(torch.finfo(dtype).min, dtype)
    best = e.op("ReduceMax", bias, e.ints(-1), keepdims=1)
    result = e.op("MatMul", probabilities, value)
    return e.op("Where", e.op("Greater", best, lowest), result, e.const(0, dtype))


def _repeated(e: Emission, x: ir.Value, groups: int, rank: int) -> ir.Value:
    if groups == 1:
        return x
    ones = [1] * (rank + 1)
    ones[rank - 2] = groups
    tiled = e.op("Expand", e.op("Unsqueeze", x, e.ints(rank - 2)), e.ints(*ones))
    shape = e.op("Mul", e.op("Shape", x), e.ints(*[1] * (rank - 3), groups, 1, 1))
    return e.op("Reshape", tiled, shape)


def _bias(e: Emission, call: Call) -> ir.Value | None:
    """What is added to the scores, at least the lowest number so that nothing becomes NaN."""
    dtype, mask = call.out.dtype, call["attn_mask"]
    lowest = e.const(torch.finfo(dtype).min, dtype)
    if mask is not None and mask.meta["val"].dtype != torch.bool:
        return e.op("Max", e.tensor(mask, dtype), lowest)
    if mask is not None:
        allowed = e.tensor(mask)
    elif call["is_causal"]:
        sizes = [e.size(call[name], -2) for name in ("query", "key")]
        ones = e.op("ConstantOfShape", e.op("Concat", *sizes, axis=0))
        ones = e.op("Add", ones, e.const(1.0))
        allowed = e.cast(e.op("Trilu", ones, upper=0), torch.float32, torch.bool)
    else:
        return None
    return e.op("Where", allowed, e.const(0, dtype), lowest)


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.scaled_dot_product_attention.default: attention,
        lam.rotary_embedding.default: rotary_embedding,
    }
)
"""Operator -> emitter."""
