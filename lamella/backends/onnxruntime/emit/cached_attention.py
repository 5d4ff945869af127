"""Attention over a cache.

Two forms. With the caches as tensors that grow (`Caches.PLAIN`) it is the standard operator of
opset 23, whose mask, cap and empty rows are those of PyTorch. With the caches as buffers it is
`com.microsoft.GroupQueryAttention`: nothing is copied, the rotary embedding is done by the
kernel where the angles depend on positions alone, and no mask is needed, because the rows of a
sequence have no gaps. Scores of a head are computed at once where they have room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from lamella.backends.onnxruntime.counts import FILLED, TOTAL
from lamella.backends.onnxruntime.emission import MICROSOFT, Caches, Call, Emission, Emitter
from lamella.backends.onnxruntime.emit import scores_at_once
from lamella.backends.onnxruntime.emit.heads import heads_joined
from lamella.backends.onnxruntime.emit.rotary_tables import rotated_alike, table_of
from lamella.backends.onnxruntime.extents import same_size

lam = torch.ops.lamella
_CODES: Mapping[str, Any] = MappingProxyType(
    {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
)
"""What a kernel is told of a cache that holds codes."""


def cached_attention(e: Emission, call: Call) -> tuple[ir.Value, ...]:
    """Attention of new tokens over past and new ones, and what the cache holds then."""
    if e.options.caches is not Caches.PLAIN:
        return _over_buffers(e, call)
    if e.options.opset >= 23:
        return _standard(e, call)
    return _written_out(e, call)


# ---- over buffers -----------------------------------------------------------------------


def _over_buffers(e: Emission, call: Call) -> tuple[ir.Value, ...]:
    query, key, tables = call["query"], call["key"], _tables(e, call)
    if tables is not None:
        query, key = Call.of(query)["input"], Call.of(key)["input"]
    joined = [_joined(e, node) for node in (query, key, call["value"])]
    taken, at_once = _packed(joined), scores_at_once.is_fit(e, call)
    if at_once:
        taken = scores_at_once.scaled_queries(e, call, taken)
    window = int(call["window"])
    heads, width = int(call.fake("query").shape[1]), int(call.fake("query").shape[3])
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": int(call.fake("key").shape[1]),
        "scale": 1.0 if at_once else float(call["scale"]),
        "softcap": float(call["softcap"]),
        "local_window_size": window or -1,
        "do_rotary": int(tables is not None),
        **(_CODES if call["key_scale"] is not None else {}),
    }
    inputs = [
        *taken,
        e.tensor(call["past_key"]),
        e.tensor(call["past_value"]),
        e.counts[FILLED],
        e.counts[TOTAL],
        *(tables or (None, None)),
        None,
        _bias(e, call),
        scores_at_once.weightless_sink(e, call) if at_once else None,
        e.optional(call["key_scale"]),
        e.optional(call["value_scale"]),
    ]
    results = e.add("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, outputs=3)
    _offer(call, e, results[0])
    split = e.op("Reshape", results[0], e.ints(0, 0, heads, width))
    return (e.op("Transpose", split, perm=[0, 2, 1, 3]), *results[1:])


def _tables(e: Emission, call: Call) -> tuple[ir.Value, ir.Value] | None:
    """Cosines and sines of all positions, when queries and keys are rotated by them."""
    rotary = call["query"]
    if not rotated_alike(rotary, call["key"]):
        return None
    cos, sin = ((Call.of(rotary)[name], "of all positions") for name in ("cos", "sin"))
    if cos not in e.views:
        table = table_of(e.graph, rotary)
        if table is None:
            return None
        e.views[cos], e.views[sin] = e.const(table.cos.numpy()), e.const(table.sin.numpy())
    return e.views[cos], e.views[sin]


def _packed(joined: list[ir.Value]) -> list[ir.Value | None]:
    """What queries, keys and values were cut from, when that is one value in this order."""
    makers = [value.producer() for value in joined]
    cut = makers[0]
    whole = (
        cut is not None
        and cut.op_type == "Split"
        and cut.attributes["axis"].as_int() in (-1, 2)
        and all(maker is cut for maker in makers)
        and list(cut.outputs) == joined
    )
    return [cut.inputs[0], None, None] if whole and cut is not None else [*joined]


def _joined(e: Emission, node: Node) -> ir.Value:
    """Heads side by side, ``[batch, new, heads * width]``."""
    value = heads_joined(e, node)
    if value is None:
        held = node.meta["val"]
        turned = e.op("Transpose", e.tensor(node), perm=[0, 2, 1, 3])
        value = e.op("Reshape", turned, e.ints(0, 0, int(held.shape[1]) * int(held.shape[3])))
    return value


def _offer(call: Call, e: Emission, joined: ir.Value) -> None:
    """The result as attention gives it, for what joins the heads afterwards."""
    for user in call.node.users:
        if user.args[1] == 0:
            e.views[user, "joined heads"] = joined


def _bias(e: Emission, call: Call) -> ir.Value | None:
    """What is added to the scores, with the axes of queries and keys in full."""
    node = call["bias"]
    if node is None:
        return None
    value, held = e.tensor(node), node.meta["val"]
    missing = 4 - held.ndim
    if missing:
        value = e.op("Unsqueeze", value, e.ints(*range(missing)))
    new, total = call.fake("query").shape[2], _total(call)
    if all(map(same_size, held.shape[-2:], (new, total))):
        return value
    return e.op("Expand", value, e.op("Concat", e.ints(1, 1), *_lengths(e, call), axis=0))


# ---- over tensors that grow -------------------------------------------------------------


def _standard(e: Emission, call: Call) -> tuple[ir.Value, ...]:
    names = ("query", "key", "value", "past_key", "past_value")
    attributes = {"scale": float(call["scale"]), "softcap": float(call["softcap"])}
    if call["key_scale"] is not None or call["value_scale"] is not None:
        keys, values = (_rows(e, call, name) for name in ("key", "value"))
        inputs = (e.tensor(call["query"]), keys.read, values.read, _hidden(e, call))
        return *e.add("Attention", inputs, attributes), keys.held, values.held
    query, key, value, past_key, past_value = (e.tensor(call[name]) for name in names)
    inputs = (query, key, value, _hidden(e, call), past_key, past_value)
    return e.add("Attention", inputs, attributes, outputs=3)


@dataclass(frozen=True)
class _Rows:
    """Keys or values of past and new tokens, as the cache holds and as attention reads them."""

    held: ir.Value
    read: ir.Value


def _rows(e: Emission, call: Call, name: str) -> _Rows:
    new, scale = e.tensor(call[name]), call[f"{name}_scale"]
    step, dtype = e.optional(scale), call.fake(name).dtype
    if step is not None:
        codes = e.op("Round", e.op("Div", new, step))
        codes = e.op("Clip", codes, e.const(-128, dtype), e.const(127, dtype))
        new = e.cast(codes, dtype, torch.int8)
    held = e.op("Concat", e.tensor(call[f"past_{name}"]), new, axis=2)
    read = held if step is None else e.op("Mul", e.cast(held, torch.int8, dtype), step)
    return _Rows(held, read)


def _hidden(e: Emission, call: Call) -> ir.Value:
    """What the standard operator takes as mask: truth values, or numbers with a bias."""
    seen = _seen(e, call)
    if call["bias"] is None:
        return seen
    low = e.const(float("-inf"), call.out_of(0).dtype)
    return e.op("Where", seen, e.tensor(call["bias"]), low)


def _seen(e: Emission, call: Call) -> ir.Value:
    """Which keys a query sees, ``[batch or 1, 1, new, past + new]``; attentions share it."""
    window, mask = int(call["window"]), call["mask"]
    key = f"seen {window} {None if mask is None else mask.name} {call.fake('query').shape[2]}"
    if key in e.counts:
        return e.counts[key]
    new, total = (e.op("Squeeze", size, e.ints(0)) for size in _lengths(e, call))
    keys = e.op("Range", e.scalar(0), total, e.scalar(1))
    queries = e.op("Range", e.op("Sub", total, new), total, e.scalar(1))
    queries = e.op("Unsqueeze", queries, e.ints(1))
    seen = e.op("LessOrEqual", keys, queries)
    if window:
        near = e.op("Greater", keys, e.op("Sub", queries, e.scalar(window)))
        seen = e.op("And", seen, near)
    seen = e.op("Unsqueeze", seen, e.ints(0, 1))
    if mask is not None:
        allowed = e.op("Unsqueeze", e.tensor(mask, torch.bool), e.ints(1, 2))
        seen = e.op("And", seen, allowed)
    e.counts[key] = seen
    return seen


def _written_out(e: Emission, call: Call) -> tuple[ir.Value, ...]:
    """In products and a softmax; a query without a key gives zeros."""
    dtype = call.out_of(0).dtype
    keys, values = (_rows(e, call, name) for name in ("key", "value"))
    heads, groups = (int(call.fake(name).shape[1]) for name in ("query", "key"))
    width, value_width = int(call.fake("query").shape[3]), int(call.fake("value").shape[3])
    # [batch, groups, heads of a group, ...]: each group of queries meets its keys.
    query = e.op("Reshape", e.tensor(call["query"]), e.ints(0, groups, heads // groups, -1, width))
    turned = e.op("Transpose", keys.read, perm=[0, 1, 3, 2])
    scaled = e.op("Mul", query, e.const(float(call["scale"]), dtype))
    scores = e.op("MatMul", scaled, e.op("Unsqueeze", turned, e.ints(2)))
    lengths = _lengths(e, call)
    shape = e.op("Concat", e.ints(0, heads), *lengths, axis=0)
    scores = e.op("Reshape", scores, shape)
    if call["softcap"]:
        cap = e.const(float(call["softcap"]), dtype)
        scores = e.op("Mul", e.op("Tanh", e.op("Div", scores, cap)), cap)
    if call["bias"] is not None:
        scores = e.op("Add", scores, e.tensor(call["bias"]))
    seen = _seen(e, call)
    low = e.const(torch.finfo(dtype).min, dtype)
    weights = e.op("Softmax", e.op("Where", seen, scores, low), axis=-1)
    weights = e.op("Where", seen, weights, e.const(0, dtype))
    split = e.op("Concat", e.ints(0, groups, heads // groups), *lengths, axis=0)
    weights = e.op("Reshape", weights, split)
    result = e.op("MatMul", weights, e.op("Unsqueeze", values.read, e.ints(2)))
    result = e.op("Reshape", result, e.ints(0, heads, -1, value_width))
    return result, keys.held, values.held


def _lengths(e: Emission, call: Call) -> tuple[ir.Value, ir.Value]:
    """How many new tokens, and how many past and new, as vectors with one entry."""
    new = e.size(call["query"], 2)
    total = _total(call)
    past = e.size(call["past_key"], 2)
    key = f"total {total}"
    if key not in e.counts:
        e.counts[key] = e.op("Add", past, new)
    return new, e.counts[key]


def _total(call: Call) -> Any:
    return call.out_of(1).shape[2]


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {lam.cached_attention.default: cached_attention}
)
"""Operator -> emitter."""
