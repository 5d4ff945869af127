"""Attention and rotary embedding of the default domain (from opset 23 on)."""

from __future__ import annotations

import math
import operator
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.values import Constant, Integer, Op, Result, Table, Value

aten = torch.ops.aten
lam = torch.ops.lamella


def attention(g: Builder, op: Op) -> Result:
    """Scaled dot-product attention on three or four axes, with or without a cache."""
    flat = g.rank(op[0]) == 3
    query, key, value = op[0], op[1], op[2]
    if flat:
        query = split_heads(g, query, op.attribute("q_num_heads"))
        key, value = (split_heads(g, x, op.attribute("kv_num_heads")) for x in (key, value))
    op.need(not op.wants(3), "the scores of attention as an output")
    op.need(op.optional(6) is None, "nonpad_kv_seqlen")
    cached = op.optional(4) is not None
    if cached:
        key, value = (
            g.call(aten.cat.default, [op[place], new], 2) for place, new in ((4, key), (5, value))
        )
    causal = bool(op.attribute("is_causal", 0))
    op.need(not (causal and cached), "a causal mask beside a cache")
    facts = causal, op.attribute("scale"), op.attribute("softcap", 0.0)
    result = attended(g, (query, key, value), op.optional(3), facts)
    if flat:
        result = join_heads(g, result)
    return result, (key if op.wants(1) else None), (value if op.wants(2) else None)


def attended(
    g: Builder,
    parts: tuple[Value, Value, Value],
    mask: Value | None,
    facts: tuple[bool, float | None, float],
) -> Any:
    """Attention of ``(query, key, value)``, ``[batch, heads, sequence, head_dim]`` each.

    Args:
        g: Builder.
        parts: Query, key and value.
        mask: Boolean or additive, or None.
        facts: Whether a causal mask applies, the scale (None: the usual one), the cap of the
            scores (0: none).
    """
    causal, scale, cap = facts
    query, key, _ = parts
    if scale is not None and _is_usual(scale, g.static(query, 3)):
        scale = None
    grouped = not g.same(g.shape(query)[1], g.shape(key)[1])
    if cap:
        return _capped(g, parts, mask, facts)
    if causal and mask is not None:
        mask, causal = _with_causal(g, mask, query, key), False
    return g.call(
        aten.scaled_dot_product_attention.default,
        *parts,
        mask,
        0.0,
        causal,
        scale=scale,
        enable_gqa=grouped,
    )


def _is_usual(scale: float, width: int | None) -> bool:
    """Whether a scale, stored as float32, is one over the root of the width."""
    return width is not None and math.isclose(scale * math.sqrt(width), 1.0, rel_tol=1e-6)


def _causal_mask(g: Builder, query: Value, key: Value) -> Any:
    rows, columns = g.shape(query)[2], g.shape(key)[2]
    full = g.call(aten.full.default, [rows, columns], True, dtype=torch.bool)
    return g.call(aten.tril.default, full, 0)


def _with_causal(g: Builder, mask: Value, query: Value, key: Value) -> Any:
    causal = _causal_mask(g, query, key)
    if g.dtype(mask) is torch.bool:
        return g.call(aten.logical_and.default, mask, causal)
    return g.call(aten.where.ScalarOther, causal, mask, float("-inf"))


def _capped(
    g: Builder,
    parts: tuple[Value, Value, Value],
    mask: Value | None,
    facts: tuple[bool, float | None, float],
) -> Any:
    """Attention whose scores pass through ``cap tanh(x / cap)``, in single steps."""
    causal, scale, cap = facts
    query, key, value = parts
    width = g.static(query, 3)
    groups = g.integer(operator.floordiv, g.shape(query)[1], g.shape(key)[1])
    if groups != 1:
        key, value = (g.call(aten.repeat_interleave.self_int, x, groups, 1) for x in (key, value))
    scores = g.call(aten.matmul.default, query, g.call(aten.transpose.int, key, 2, 3))
    factor = scale if scale is not None else (width or 1) ** -0.5
    scores = g.call(aten.mul.Tensor, scores, factor / cap)
    scores = g.call(aten.mul.Tensor, g.call(aten.tanh.default, scores), cap)
    if causal:
        blocked = _causal_mask(g, query, key)
        mask = blocked if mask is None else _with_causal(g, mask, query, key)
    if mask is not None and g.dtype(mask) is torch.bool:
        scores = g.call(aten.where.ScalarOther, mask, scores, float("-inf"))
    elif mask is not None:
        scores = g.call(aten.add.Tensor, scores, mask)
    return g.call(aten.matmul.default, g.call(aten.softmax.int, scores, -1), value)


def split_heads(g: Builder, value: Value, heads: Integer) -> Any:
    """``[batch, sequence, heads * width]`` as ``[batch, heads, sequence, width]``."""
    batch, sequence, features = g.shape(value)
    width = g.integer(operator.floordiv, features, heads)
    parts = g.call(aten.reshape.default, value, [batch, sequence, heads, width])
    return g.call(aten.transpose.int, parts, 1, 2)


def join_heads(g: Builder, value: Value) -> Any:
    """``[batch, heads, sequence, width]`` as ``[batch, sequence, heads * width]``."""
    batch, heads, sequence, width = g.shape(value)
    moved = g.call(aten.transpose.int, value, 1, 2)
    return g.call(
        aten.reshape.default, moved, [batch, sequence, g.integer(operator.mul, heads, width)]
    )


# ---- rotary embedding -----------------------------------------------------------------------


def rotary(g: Builder, op: Op) -> Result:
    """Rotary embedding: input, cosines, sines, positions."""
    facts = op.attribute("num_heads", 0), op.attribute("rotary_embedding_dim", 0)
    interleaved = bool(op.attribute("interleaved", 0))
    return rotated(g, op[0], (op[1], op[2], op.optional(3)), (*facts, interleaved))


def rotated(
    g: Builder,
    value: Value,
    tables: tuple[Value, Value, Value | None],
    facts: tuple[int, int, bool],
) -> Any:
    """Channels of `value` rotated in pairs.

    Args:
        g: Builder.
        value: ``[batch, heads, sequence, width]`` or ``[batch, sequence, heads * width]``.
        tables: Cosines and sines of half the width, by position ``[positions, half]``, or for
            each place ``[batch, sequence, half]`` when there are no positions.
        facts: Number of heads (for three axes), channels that are rotated (0: all), and whether
            pairs lie side by side.
    """
    heads, turning, interleaved = facts
    flat = g.rank(value) == 3
    if flat:
        first = tables[0]
        half = g.static(first, g.rank(first) - 1) or 1
        width = turning or 2 * half
        heads = heads or g.integer(operator.floordiv, g.shape(value)[2], width)
        value = split_heads(g, value, heads)
    cosine, sine = (_table(g, part, tables[2], interleaved) for part in tables[:2])
    whole = g.static(value, 3)
    if turning and turning != whole:
        front = g.call(aten.slice.Tensor, value, 3, 0, turning)
        back = g.call(aten.slice.Tensor, value, 3, turning, 2**63 - 1)
        turned = g.call(lam.rotary_embedding.default, front, cosine, sine, interleaved)
        result = g.call(aten.cat.default, [turned, back], 3)
    else:
        result = g.call(lam.rotary_embedding.default, value, cosine, sine, interleaved)
    return join_heads(g, result) if flat else result


def _table(g: Builder, table: Value, positions: Value | None, interleaved: bool) -> Any:
    """``[batch, 1, sequence, width]`` from half of the channels; the batch may be 1."""
    if positions is not None and _counts(g, positions, table):
        table = g.call(aten.unsqueeze.default, table, 0)
    elif positions is not None and isinstance(table, Constant):
        table = g.call(aten.embedding.default, table, positions)
    elif positions is not None:
        table = g.call(aten.index.Tensor, table, [positions])
    if interleaved:
        both = g.call(aten.repeat_interleave.self_int, table, 2, -1)
    else:
        both = g.call(aten.cat.default, [table, table], -1)
    return g.call(aten.unsqueeze.default, both, 1)


def _counts(g: Builder, positions: Value, table: Value) -> bool:
    """Whether positions are ``0, 1, ...`` up to the length of the table, for every sample."""
    rows = g.shape(table)[0]
    counted: Any = positions
    if isinstance(counted, Node) and counted.target is aten.expand.default:
        counted = counted.args[0]
    if not isinstance(counted, Node) or counted.target is not aten.arange.start_step:
        return False
    start, end, step = counted.args
    return (start, step) == (0, 1) and isinstance(end, int | Node) and g.same(end, rows)


TABLE: Table = MappingProxyType({"Attention": attention, "RotaryEmbedding": rotary})
"""ONNX operator -> builder."""
