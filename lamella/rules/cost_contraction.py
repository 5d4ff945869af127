"""Cost of matrix products, convolutions, attention, norms, pooling and scans.

A product of ``[M, K]`` and ``[K, N]`` is ``2 M N K`` operations. Attention counts all pairs of a
query and a key, also where a mask hides them, as dense kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import sympy

from lamella.ir.ops import aten, lam
from lamella.rules.cost_elementwise import SIMPLE, SOFTMAX, TRANSCENDENTAL, CostRule, per_input
from lamella.rules.work import Call, Expr, Work, product

Target = Callable[..., Any]

LAYER_NORM = 8
RMS_NORM = 5
BATCH_NORM = 2
BILINEAR = 7
BICUBIC = 35


def linear(call: Call) -> Work:
    """``2 * rows * out * in``, and the bias."""
    *_, features = call.shape("input")
    bias = call.output_size if call.operand("bias") is not None else 0
    return call.work(bias, 2 * call.output_size * features)


def matmul(call: Call) -> Work:
    """``2 * M * N * K`` for each matrix of the (broadcast) batch."""
    return call.work(0, 2 * call.output_size * call.shape("self")[-1])


def einsum(call: Call) -> Work:
    """Twice the product of the sizes of all indices; operands are contracted at once."""
    left = str(call.operand("equation")).split("->")[0].replace(" ", "")
    operands: Any = call.operand("tensors")
    sizes: dict[str, Expr] = {}
    batch: tuple[Expr, ...] = ()
    for term, operand in zip(left.split(","), operands, strict=True):
        shape = call.shape_of(operand)
        letters = term.replace("...", "")
        # The axes that "..." stands for broadcast; the longest shape has all of them.
        hidden = len(shape) - len(letters)
        start = term.index("...") if "..." in term else 0
        batch = max(batch, shape[start : start + hidden], key=len)
        named = (*shape[:start], *shape[start + hidden :])
        sizes.update(zip(letters, named, strict=True))
    return call.work(0, 2 * product((*sizes.values(), *batch)))


def convolution(call: Call) -> Work:
    """``2 * output elements * in channels per group * kernel``, and the bias."""
    _, *kernel = call.shape("weight")
    bias = call.output_size if call.operand("bias") is not None else 0
    return call.work(bias, 2 * call.output_size * product(tuple(kernel)))


def transposed_convolution(call: Call) -> Work:
    """``2 * input elements * out channels per group * kernel``, and the bias."""
    _, *kernel = call.shape("weight")
    bias = call.output_size if call.operand("bias") is not None else 0
    return call.work(bias, 2 * call.size("input") * product(tuple(kernel)))


def grouped_linear(call: Call) -> Work:
    """Every row meets one expert; the weights of all experts count as read."""
    return call.work(0, 2 * call.output_size * call.shape("input")[-1])


def attention(call: Call) -> Work:
    """Scores and weighted values for all pairs of a query and a key, and the softmax.

    What a decoder keeps of keys and values depends on the mask; the analysis adds it.
    """
    *batch, queries, width = call.shape("query")
    keys = call.shape("key")[-2]
    values = call.shape("value")[-1]
    pairs = product((*batch, queries, keys))
    return call.work(SOFTMAX * pairs, 2 * pairs * (width + values))


def attention_adjoint(call: Call) -> Work:
    """Scores and their softmax once more, and one product for each of four coefficients."""
    return _of_pairs(call, 3, 2)


def attention_value_adjoint(call: Call) -> Work:
    """Scores and their softmax once more, and the weighted sum of coefficients."""
    return _of_pairs(call, 1, 1)


def _of_pairs(call: Call, by_width: int, by_values: int) -> Work:
    """Products for all pairs of a query and a key over the width of queries and of values."""
    *batch, queries, width = call.shape("query")
    pairs = product((*batch, queries, call.shape("key")[-2]))
    values = call.shape("coefficient")[-1]
    return call.work(SOFTMAX * pairs, 2 * pairs * (by_width * width + by_values * values))


def cached_attention(call: Call) -> Work:
    """The same for new queries over the keys of past and new tokens; the cache is those keys."""
    *batch, queries, width = call.shape("query")
    kept = [*call.shape("past_key")[:2], call.shape("past_key")[2] + queries]
    pairs = product((*batch, queries, kept[2]))
    values = call.shape("value")[-1]
    work = call.work(SOFTMAX * pairs, 2 * pairs * (width + values))
    key, value = (call.operand(f"past_{n}").meta["val"].dtype.itemsize for n in ("key", "value"))
    cache = product((*kept, width * key + values * value))
    return replace(work, cache_bytes=cache)


def embedding(call: Call) -> Work:
    """Rows are picked: the bytes of the result are read from the table."""
    written = call.written_bytes()
    return Work(read_bytes=call.read_bytes(), written_bytes=written, weight_bytes=written)


def embedding_nbits(call: Call) -> Work:
    """Rows are picked and expanded: one product and one difference for each element."""
    rows = product(call.shape("indices"))
    table = call.shape("scales")[0]
    return Work(
        flops=2 * call.output_size,
        read_bytes=call.read_bytes(),
        written_bytes=call.written_bytes(),
        weight_bytes=call.weight_bytes() / table * rows,
    )


def selective_scan(call: Call) -> Work:
    """Per state and step: one exponential and six operations; the cache is the state."""
    batch, channels, steps = call.shape("input")
    states = call.shape("a")[-1]
    updates = batch * channels * steps * states
    work = call.work((TRANSCENDENTAL + 6) * updates)
    return replace(work, cache_bytes=batch * channels * states * call.bytes_per_element())


def head_scan(call: Call) -> Work:
    """Per state and step: six operations; one exponential per head and step."""
    batch, steps, heads, width = call.shape("input")
    states = call.shape("b")[-1]
    held = batch * heads * width * states
    work = call.work(6 * held * steps + TRANSCENDENTAL * batch * heads * steps)
    return replace(work, cache_bytes=held * call.bytes_per_element())


def linear_scan(call: Call) -> Work:
    """A product and a sum for each state and step."""
    return call.work(2 * call.output_size)


def dequantize_nbits(call: Call) -> Work:
    """One product and one difference for each element."""
    return call.work(2 * call.output_size)


def pooling(call: Call) -> Work:
    """One operation for each element of each window."""
    kernel: Any = call.operand("kernel_size")
    sizes = [kernel] if isinstance(kernel, int) else list(kernel)
    axes = 1 if call.node.target is aten.avg_pool1d.default else 2
    window = sizes * axes if len(sizes) == 1 else sizes
    return call.work(call.output_size * product(tuple(map(sympy.sympify, window))))


def resizing(flops: int) -> CostRule:
    """`flops` for each element of the result."""
    return lambda call: call.work(flops * call.output_size)


CONTRACTING: Mapping[Target, CostRule] = {
    aten.linear.default: linear,
    lam.linear_nbits.default: linear,
    lam.linear_int8.default: linear,
    lam.linear_int8_static.default: linear,
    lam.conv_int8.default: convolution,
    aten.matmul.default: matmul,
    aten.einsum.default: einsum,
    aten.conv1d.default: convolution,
    aten.conv2d.default: convolution,
    aten.conv_transpose2d.input: transposed_convolution,
    lam.grouped_linear.default: grouped_linear,
    aten.scaled_dot_product_attention.default: attention,
    lam.attention_adjoint.default: attention_adjoint,
    lam.attention_value_adjoint.default: attention_value_adjoint,
    lam.cached_attention.default: cached_attention,
    lam.selective_scan.default: selective_scan,
    lam.cached_selective_scan.default: selective_scan,
    lam.head_scan.default: head_scan,
    lam.cached_head_scan.default: head_scan,
    lam.linear_scan.default: linear_scan,
}
"""Matrix products and what is made of them."""

LAYERS: Mapping[Target, CostRule] = {
    aten.embedding.default: embedding,
    lam.embedding_nbits.default: embedding_nbits,
    aten.layer_norm.default: per_input(LAYER_NORM),
    aten.group_norm.default: per_input(LAYER_NORM),
    aten.rms_norm.default: per_input(RMS_NORM),
    aten.batch_norm.default: per_input(BATCH_NORM),
    lam.dequantize_nbits.default: dequantize_nbits,
    aten.max_pool2d.default: pooling,
    aten.max_pool2d_with_indices.default: pooling,
    aten.avg_pool2d.default: pooling,
    aten.avg_pool1d.default: pooling,
    aten.adaptive_avg_pool1d.default: per_input(SIMPLE),
    aten.adaptive_avg_pool2d.default: per_input(SIMPLE),
    aten.upsample_nearest2d.vec: resizing(0),
    aten.upsample_bilinear2d.vec: resizing(BILINEAR),
    aten.upsample_bicubic2d.vec: resizing(BICUBIC),
}
"""Embeddings, norms, pooling and resizing."""
