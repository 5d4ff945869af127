"""Attention.

From opset 23 on it is a standard operator, with the semantics of PyTorch (broadcast masks,
rows without a key are zero, grouped queries, causal from the upper left), and faster in ONNX
Runtime than `com.microsoft.MultiHeadAttention` (`benchmarks/onnx_kernels.py`).
It also takes heads side by side, ``[batch, sequence, heads * width]``, as the projections
write them, so that no transposition is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.emit.heads import heads_joined
from lamella.backends.onnxruntime.extents import same_size

aten = torch.ops.aten


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
    }
)
"""Operator -> emitter."""
