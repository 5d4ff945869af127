"""Attention written out: `aten.scaled_dot_product_attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import (
    dtype_of,
    is_tensor,
    same_extent,
    same_shape,
    shape_of,
)
from lamella.rewrite.pattern import AnyOf, Call, Cast, Match, Number, Pattern, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default
_FAR = -1e20
"""A masking value below this swamps every score, so that adding is as good as replacing."""

_PRODUCT = Call(aten.matmul.default, Var("q"), Var("kt"))
_SCALED = AnyOf(
    Call(aten.mul.Tensor, _PRODUCT, Number("scale")),
    Call(aten.div.Tensor, _PRODUCT, Number("divisor")),
    _PRODUCT,
)
_SCORES = Cast(
    AnyOf(
        Call(aten.add.Tensor, _SCALED, Var("mask")),
        Call(
            (aten.masked_fill.Scalar, aten.masked_fill.Tensor),
            _SCALED,
            Var("hidden"),
            Number("far"),
        ),
        Call(aten.where.ScalarOther, Var("shown"), _SCALED, Number("far")),
        Call(aten.where.self, Var("shown"), _SCALED, Number("far")),
        Call(aten.where.ScalarSelf, Var("hidden"), Number("far"), _SCALED),
        Call(aten.where.self, Var("hidden"), Number("far"), _SCALED),
        _SCALED,
    )
)


def _weighted(scores: Pattern) -> Pattern:
    return Call(
        aten.matmul.default, Cast(Call(aten.softmax.int, scores, Var("dim"), ...)), Var("v")
    )


@rule(_weighted(_SCORES))
def attention_from_softmax(graph: Graph, found: Match) -> Node | Skip:
    """``softmax(q k^T * scale + mask) v -> scaled_dot_product_attention(q, k, v, mask)``.

    A mask that replaces scores by a very small number becomes one that adds it. Between
    product and softmax nothing else may happen: a soft cap (tanh) is no attention of this kind.
    """
    q, kt, v, root = found["q"], found["kt"], found["v"], found.root
    problem = _not_attention(q, kt, v, found)
    if problem:
        return Skip(problem)
    mask = _mask(graph, found)
    if isinstance(mask, Skip):
        return mask
    axes = len(shape_of(kt)) - 2, len(shape_of(kt)) - 1
    k = graph.call(aten.transpose.int, kt, *axes, before=root)
    scale = float(found.get("scale", 1.0)) / float(found.get("divisor", 1.0))
    return _attention(graph, (q, k, v), mask, scale, root)


def _attention(
    graph: Graph, operands: tuple[Node, Node, Node], mask: Node | None, scale: float, root: Node
) -> Node:
    return graph.call(
        _SDPA, *operands, mask, 0.0, False, scale=scale, enable_gqa=False, before=root, like=root
    )


def _not_attention(q: Node, kt: Node, v: Node, found: Match) -> str | None:
    ndim = len(shape_of(found.root))
    if ndim < 3 or not all(is_tensor(x) and len(shape_of(x)) == ndim for x in (q, kt, v)):
        return "query, key and value are not three tensors of three or more axes"
    if found["dim"] not in (-1, ndim - 1):
        return f"the softmax is over axis {found['dim']}, not over the keys"
    if len({dtype_of(x) for x in (q, kt, v)}) > 1:
        return "query, key and value differ in dtype"
    leading = [shape_of(x)[:-2] for x in (q, kt, v)]
    if not same_shape(leading[0], leading[1]) or not same_shape(leading[0], leading[2]):
        return "query, key and value differ in their leading axes"
    return None


def _mask(graph: Graph, found: Match) -> Node | Skip | None:
    """What is added to the scores."""
    root = found.root
    q, kt = found["q"], found["kt"]
    scores = (*shape_of(q)[:-1], shape_of(kt)[-1])
    mask = found.get("mask")
    condition = found.get("shown") or found.get("hidden")
    if mask is None and condition is None:
        return None
    read = mask if condition is None else condition
    if not is_tensor(read) or len(shape_of(read)) < 2 or not _broadcasts(shape_of(read), scores):
        return Skip("the mask does not have the shape of the scores")
    if condition is not None:
        return _added(graph, found, condition)
    if dtype_of(mask) != dtype_of(q):
        return Skip(f"the mask is {dtype_of(mask)} and the query {dtype_of(q)}")
    return mask if mask is not root else None


def _added(graph: Graph, found: Match, condition: Node) -> Node | Skip:
    far = float(found["far"])
    if far > _FAR:
        return Skip(f"the masked scores are replaced by {far}, which is not far below all others")
    root, dtype = found.root, dtype_of(found["q"])
    nothing = graph.call(aten.full.default, [], 0.0, dtype=dtype, before=root)
    hidden = graph.call(aten.full.default, [], far, dtype=dtype, before=root)
    pair = (nothing, hidden) if found.get("shown") is not None else (hidden, nothing)
    return graph.call(aten.where.self, condition, *pair, before=root)


def _broadcasts(shape: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    if len(shape) > len(wanted):
        return False
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return all(same_extent(one, 1) or same_extent(one, two) for one, two in pairs)


@rule(Call(_SDPA, Var("q"), Var("k"), Var("v"), ...))
def attention_in_full(graph: Graph, found: Match) -> Node | Skip:
    """``sdpa(q, k, v) -> sdpa(q, k, v, None, 0.0, False, scale=1/sqrt(n), enable_gqa=False)``."""
    root, q = found.root, found["q"]
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    mask, dropout, causal, scale, grouped = (graph.operand(root, name) for name in names)
    width = shape_of(q)[-1]
    if scale is None and isinstance(width, int):
        scale = 1.0 / math.sqrt(width)
    args = (q, found["k"], found["v"], mask, float(dropout), causal)
    kwargs = {"scale": scale, "enable_gqa": grouped}
    if root.args == args and root.kwargs == kwargs:
        return Skip("everything is written out")
    return graph.call(_SDPA, *args, before=root, like=root, **kwargs)


def _repeated(name: str) -> Pattern:
    """Heads that are repeated for groups of queries."""
    return AnyOf(
        Call(
            aten.reshape.default,
            Call(
                aten.expand.default,
                Call(aten.unsqueeze.default, Var(name), 2),
                Var(f"{name}_expanded"),
                ...,
            ),
            Var(f"{name}_size"),
        ),
        Call(aten.repeat_interleave.self_int, Var(name), Var(f"{name}_times"), 1, ...),
    )


@rule(Call(_SDPA, Var("q"), _repeated("k"), _repeated("v"), ...))
def attention_of_repeated_heads(graph: Graph, found: Match) -> Node | Skip:
    """``sdpa(q, repeat_kv(k), repeat_kv(v)) -> sdpa(q, k, v, enable_gqa=True)``."""
    root = found.root
    q, k, v = found["q"], found["k"], found["v"]
    repeated = root.args[1:3]
    for short, long in zip((k, v), repeated, strict=True):
        problem = _not_repeated(short, long)
        if problem:
            return Skip(problem)
    heads = [shape_of(x)[1] for x in (q, k, v)]
    if heads[1] != heads[2] or heads[0] % heads[1] or root.kwargs.get("enable_gqa"):
        return Skip(f"{heads[0]} heads of queries are no groups for {heads[1:]} heads")
    args = (q, k, v, *root.args[3:])
    kwargs = {**root.kwargs, "enable_gqa": True}
    return graph.call(_SDPA, *args, before=root, like=root, **kwargs)


def _not_repeated(short: Node, long: Any) -> str | None:
    """Why `long` is not `short` with each head repeated, or None if it is."""
    if len(shape_of(short)) != 4 or len(shape_of(long)) != 4:
        return f"{short.name} does not have the axes batch, head, token, channel"
    batch, heads, tokens, width = shape_of(short)
    many = shape_of(long)[1]
    if not isinstance(heads, int) or not isinstance(many, int) or many % heads:
        return f"{long.name} does not have a fixed multiple of the heads of {short.name}"
    if not same_shape((batch, tokens, width), (shape_of(long)[0], *shape_of(long)[2:])):
        return f"{long.name} and {short.name} differ in more than the heads"
    if long.target is aten.reshape.default:
        expanded = shape_of(long.args[0])
        if not same_shape(expanded, (batch, heads, many // heads, tokens, width)):
            return f"{long.args[0].name} does not repeat each head"
    return None


ATTENTION: tuple[Rule, ...] = (attention_from_softmax, attention_of_repeated_heads)
ATTENTION_SPELLING: tuple[Rule, ...] = (attention_in_full,)
