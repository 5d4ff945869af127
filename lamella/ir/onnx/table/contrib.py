"""Operators of ONNX Runtime (domain ``com.microsoft``) that optimized and quantized models use."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch.fx import Node

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.table.activations import swish
from lamella.ir.onnx.table.attention import attended, join_heads, rotated, split_heads
from lamella.ir.onnx.table.contraction import fused_matmul
from lamella.ir.onnx.table.integers import dynamic_matmul, matmul_to_float
from lamella.ir.onnx.table.normalization import normalized, rms_norm, root_mean_square
from lamella.ir.onnx.table.shapes import reshaped
from lamella.ir.onnx.values import Handler, Op, Result, Table, Value

aten = torch.ops.aten
lam = torch.ops.lamella


# ---- fused elementwise and normalization ----------------------------------------------------


def bias_gelu(g: Builder, op: Op) -> Result:
    """GELU of a sum; by tanh for ``FastGelu``."""
    value, bias = op[0], op.optional(1)
    if bias is not None:
        value = g.call(aten.add.Tensor, value, bias)
    approximate = "tanh" if op.kind == "FastGelu" else "none"
    return g.call(aten.gelu.default, value, approximate=approximate)


def skip_norm(g: Builder, op: Op) -> Result:
    """A residual add and the norm after it; the sum is the fourth output."""
    simplified = op.kind.startswith("SkipSimplified")
    bias = op.optional(3 if simplified else 4)
    op.need(not (op.wants(1) or op.wants(2)), "mean and deviation as outputs")
    summed = g.call(aten.add.Tensor, op[0], op[1])
    if bias is not None:
        summed = g.call(aten.add.Tensor, summed, bias)
    axis, epsilon = g.rank(summed) - 1, op.attribute("epsilon", 1e-5 if simplified else 1e-12)
    if simplified:
        result = root_mean_square(g, summed, op[2], axis, epsilon)
    else:
        result = normalized(g, (summed, op[2], op.optional(3)), axis, epsilon)
    return result, None, None, summed


# ---- attention ------------------------------------------------------------------------------


def multi_head_attention(g: Builder, op: Op) -> Result:
    """Attention of separate queries, keys and values, ``[batch, sequence, features]``."""
    query, key, value, bias = op[0], op[1], op[2], op.optional(3)
    op.need(g.rank(query) == 3, "packed queries, keys and values")
    op.need(all(value is None for value in op.inputs[8:]), "a shared cache")
    heads = op.attribute("num_heads")
    if bias is not None:
        query, key, value = _biased(g, (query, key, value), bias)
    query = split_heads(g, query, heads)
    key, value = (x if g.rank(x) == 4 else split_heads(g, x, heads) for x in (key, value))
    cached = op.optional(6) is not None
    if cached:
        key = g.call(aten.cat.default, [op[6], key], 2)
        value = g.call(aten.cat.default, [op[7], value], 2)
    causal = bool(op.attribute("unidirectional", 0))
    op.need(not (causal and cached), "a causal mask beside a cache")
    mask = _merged(g, op, op.optional(4), op.optional(5))
    result = attended(g, (query, key, value), mask, (causal, _scale(op), 0.0))
    return join_heads(g, result), key, value


def _scale(op: Op) -> float | None:
    return op.attribute("scale", 0.0) or None


def _biased(
    g: Builder, parts: tuple[Value, Value, Value], bias: Value
) -> tuple[Value, Value, Value]:
    """Queries, keys and values with their parts of one bias added."""
    start, moved = 0, []
    for part in parts:
        width = g.static(part, g.rank(part) - 1) or 0
        own = g.call(aten.slice.Tensor, bias, 0, start, start + width)
        moved.append(g.call(aten.add.Tensor, part, own))
        start += width
    return moved[0], moved[1], moved[2]


def _merged(g: Builder, op: Op, padding: Value | None, bias: Value | None) -> Value | None:
    """One mask of a padding mask ``[batch, keys]`` and an additive bias."""
    if padding is None:
        return bias
    op.need(g.rank(padding) == 2, "a key padding mask of lengths")
    kept = g.call(aten.ne.Scalar, padding, 0)
    kept = g.call(aten.unsqueeze.default, g.call(aten.unsqueeze.default, kept, 1), 1)
    if bias is None:
        return kept
    return g.call(aten.where.ScalarOther, kept, bias, op.attribute("mask_filter_value", -1e4))


def rotary(g: Builder, op: Op) -> Result:
    """Rotary embedding: input, positions, cosines, sines."""
    positions = op[1]
    op.need(g.rank(positions) == 2, "one offset as the positions of a rotary embedding")
    facts = op.attribute("num_heads", 0), op.attribute("rotary_embedding_dim", 0)
    interleaved = bool(op.attribute("interleaved", 0))
    return rotated(g, op[0], (op[2], op[3], positions), (*facts, interleaved))


# ---- few bits -------------------------------------------------------------------------------


def matmul_nbits(g: Builder, op: Op) -> Result:
    """A linear layer with a weight of few bits in blocks."""
    features, outputs = op.attribute("K"), op.attribute("N")
    bits, block = op.attribute("bits", 4), op.attribute("block_size")
    op.need(bits in (2, 4, 8), f"{bits} bits")
    op.need(op.optional(4) is None, "reordered groups (g_idx)")
    blocks = -(-features // block)
    packed = reshaped(g, op[1], [outputs, blocks, block * bits // 8])
    scales = reshaped(g, _as_stored(op[2]), [outputs, blocks])
    zeros = op.optional(3)
    if zeros is not None:
        op.need(g.dtype(zeros) is torch.uint8, "zero points that are not packed")
        zeros = reshaped(g, zeros, [outputs, -(-blocks * bits // 8)])
    rounds = op.attribute("accuracy_level", 0) == 4
    rest = (zeros, op.optional(5), bits, block, rounds)
    return g.call(lam.linear_nbits.default, op[0], packed, scales, *rest)


def _as_stored(scales: Value) -> Value:
    """Scales as the file has them: the operator of the graph takes them in any type."""
    if isinstance(scales, Node) and scales.target is aten.to.dtype:
        source = scales.args[0]
        if isinstance(source, Node) and source.op == "get_attr":
            return source
    return scales


def gather_nbits(g: Builder, op: Op) -> Result:
    """Rows of a table of few bits in blocks."""
    table, indices, scales, zeros = op[0], op[1], op[2], op.optional(3)
    bits, block = op.attribute("bits", 4), op.attribute("block_size", 128)
    rank = g.rank(table)
    last = op.attribute("quantize_axis", 1) in (1, -1)
    op.need(rank == 2 and last, "a table that is not quantized along its last axis of two")
    op.need(op.attribute("gather_axis", 0) == 0, "gathering along other than the first axis")
    table = g.constant(table)
    op.need(table.bits is None and table.tensor.dtype is torch.uint8, "a table of signed codes")
    rows, width = table.tensor.shape
    blocks = g.static(scales, 1) or 1
    features = width * 8 // bits
    op.need(features == blocks * block, "a table whose last block is short")
    packed = reshaped(g, table, [rows, blocks, block * bits // 8])
    rest = (indices, bits, block, features)
    return g.call(lam.embedding_nbits.default, packed, scales, zeros, *rest)


_KNOWN: Mapping[str, tuple[Handler, str]] = {
    # Operator -> builder, and the attributes that it knows.
    "BiasGelu": (bias_gelu, ""),
    "DynamicQuantizeMatMul": (dynamic_matmul, ""),
    "FastGelu": (bias_gelu, ""),
    "FusedMatMul": (fused_matmul, "alpha transA transB transBatchA transBatchB"),
    "GatherBlockQuantized": (gather_nbits, "bits block_size gather_axis quantize_axis"),
    "Gelu": (bias_gelu, ""),
    "MatMulIntegerToFloat": (matmul_to_float, ""),
    "MatMulNBits": (matmul_nbits, "K N accuracy_level bits block_size"),
    "MultiHeadAttention": (
        multi_head_attention,
        "mask_filter_value num_heads scale unidirectional",
    ),
    "QuickGelu": (swish, "alpha"),
    "RotaryEmbedding": (rotary, "interleaved num_heads rotary_embedding_dim"),
    "SimplifiedLayerNormalization": (rms_norm, "axis epsilon stash_type"),
    "SkipLayerNormalization": (skip_norm, "epsilon"),
    "SkipSimplifiedLayerNormalization": (skip_norm, "epsilon"),
}


def _checked(build: Handler, names: str) -> Handler:
    """`build`, for nodes that say nothing beyond `names`.

    Operators of this domain have no versions: what a newer attribute means is not known.
    """
    known = names.split()

    def checked(g: Builder, op: Op) -> Result:
        unknown = [name for name, value in op.attributes.items() if name not in known and value]
        op.need(not unknown, f"attribute {', '.join(unknown)}")
        return build(g, op)

    return checked


TABLE: Table = MappingProxyType({kind: _checked(*entry) for kind, entry in _KNOWN.items()})
"""ONNX Runtime operator -> builder."""
