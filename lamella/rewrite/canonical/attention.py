"""Attention written out: `aten.scaled_dot_product_attention`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import (
    dtype_of,
    is_tensor,
    parts_of,
    same_extent,
    same_shape,
    shape_of,
)
from lamella.rewrite.pattern import AnyOf, Call, Cast, Match, Matcher, Number, Pattern, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default
_FAR = -1e20
"""A masking value below this swamps every score, so that adding is as good as replacing."""


@dataclass(frozen=True)
class _Scores:
    """What a softmax is taken of: ``scale * matmul(q, kt)`` plus masks.

    The path leads from the product to what the softmax reads.
    """

    q: Node
    kt: Node
    path: tuple[Node, ...]
    scale: float = 1.0
    masks: tuple[Node, ...] = ()


_SOFTMAX = Call(aten.softmax.int, Var("scores"), Var("dim"), ...)
_ALL_HIDDEN = Call(
    aten.logical_not.default,
    Call(
        aten.any.dim,
        Call(aten.logical_not.default, Call(aten.eq.Scalar, Var("scores"), -math.inf)),
        Var("dim"),
        True,
    ),
)
# The operator gives zero where a query sees nothing, as the two longer forms do.
_SAFE = AnyOf(
    _SOFTMAX,
    Call(aten.where.ScalarSelf, _ALL_HIDDEN, 0, _SOFTMAX),
    Call(aten.where.ScalarSelf, Call(aten.isnan.default, _SOFTMAX), 0, _SOFTMAX),
)


@rule(Call(aten.matmul.default, Cast(_SAFE), Var("v")))
def attention_from_softmax(graph: Graph, found: Match) -> Node | Skip:
    """``softmax(q k^T * scale + mask) v -> scaled_dot_product_attention(q, k, v, mask)``.

    Up to any number of masks may be added, or may replace scores by a very small number, which
    becomes a mask that adds it. Between product and softmax nothing else may happen: a soft cap
    (tanh), or a reshape, is no attention of this kind.
    """
    root, v = found.root, found["v"]
    scores = _scores(graph, found["scores"], root)
    if isinstance(scores, Skip):
        return scores
    problem = _read_elsewhere(scores, found) or _not_attention(scores, v, found["dim"])
    if problem:
        return Skip(problem)
    axes = len(shape_of(v)) - 2, len(shape_of(v)) - 1
    k = graph.call(aten.transpose.int, scores.kt, *axes, before=root)
    mask: Node | None = None
    for one in scores.masks:
        mask = one if mask is None else graph.call(aten.add.Tensor, mask, one, before=root)
    args = (scores.q, k, v, mask, 0.0, False)
    kwargs: dict[str, Any] = {"scale": scores.scale, "enable_gqa": False}
    return graph.call(_SDPA, *args, before=root, like=root, **kwargs)


def _scores(graph: Graph, node: Any, root: Node) -> _Scores | Skip:
    """Walk from the softmax up to the product of queries and keys."""
    if not is_tensor(node):
        return Skip("the scores are no tensor")
    if node.target is aten.matmul.default:
        return _Scores(node.args[0], node.args[1], (node,))
    if node.target is aten.to.dtype:
        inner = _scores(graph, node.args[0], root)
        return inner if isinstance(inner, Skip) else _through(inner, node)
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return _scaled(graph, node, root)
    if node.target is aten.add.Tensor:
        return _added(graph, node, root)
    if node.target in _REPLACING:
        return _replaced(graph, node, root)
    return Skip(
        f"between product and softmax stands {node.name} ({ops.op_name(node.target)}), which is "
        f"neither a factor nor a mask"
    )


def _through(inner: _Scores, node: Node, **changes: Any) -> _Scores:
    return dataclasses.replace(inner, path=(*inner.path, node), **changes)


def _read_elsewhere(scores: _Scores, found: Match) -> str | None:
    """Whether raising would compute the scores a second time."""
    known = {*scores.path, *found.nodes}
    for node in scores.path:
        others = [user.name for user in node.users if user not in known]
        if others:
            return f"the scores {node.name} are read by {', '.join(others)} too"
    return None


def _scaled(graph: Graph, node: Node, root: Node) -> _Scores | Skip:
    x, other = node.args[0], node.args[1]
    matcher = Matcher(graph)
    factor = matcher.number(other)
    if factor is None and node.target is aten.mul.Tensor:
        x, factor = other, matcher.number(x)
    if factor is None:
        return Skip(f"the scores are multiplied at {node.name} by something that is no number")
    inner = _scores(graph, x, root)
    if isinstance(inner, Skip):
        return inner
    if inner.masks:
        return Skip(f"the scores are scaled at {node.name} after a mask was added")
    scale = inner.scale * factor if node.target is aten.mul.Tensor else inner.scale / factor
    return _through(inner, node, scale=float(scale))


def _added(graph: Graph, node: Node, root: Node) -> _Scores | Skip:
    """The operand that leads to the product is the scores, the other one the mask."""
    _, (one, two), _ = parts_of(node)
    first: Skip | None = None
    for scores, mask in ((one, two), (two, one)):
        if not is_tensor(scores) or not is_tensor(mask):
            return Skip(f"a number is added at {node.name}")
        if not same_shape(shape_of(scores), shape_of(node)):
            continue
        inner = _scores(graph, scores, root)
        if isinstance(inner, _Scores):
            return _with_mask(inner, mask, mask, node)
        first = first or inner
    return first or Skip(f"what is added at {node.name} is larger than the scores")


_REPLACING = (
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
)


def _replaced(graph: Graph, node: Node, root: Node) -> _Scores | Skip:
    """Scores replaced by a very small number: a mask that adds it does the same."""
    _, (first, second, third), _ = parts_of(node)
    matcher = Matcher(graph)
    if node.target in _REPLACING[:2]:
        scores, hidden, far, shows = first, second, matcher.number(third), False
    elif matcher.number(second) is not None:
        scores, hidden, far, shows = third, first, matcher.number(second), False
    else:
        scores, hidden, far, shows = second, first, matcher.number(third), True
    if far is None or far > _FAR:
        return Skip(f"scores are replaced at {node.name} by {far}, not by a number below {_FAR}")
    inner = _scores(graph, scores, root)
    if isinstance(inner, Skip):
        return inner
    dtype = dtype_of(inner.q)
    zero = graph.call(aten.full.default, [], 0.0, dtype=dtype, before=root)
    low = graph.call(aten.full.default, [], float(far), dtype=dtype, before=root)
    pair = (zero, low) if shows else (low, zero)
    mask = graph.call(aten.where.self, hidden, *pair, before=root)
    return _with_mask(inner, mask, hidden, node)


def _with_mask(inner: _Scores, mask: Node, read: Any, node: Node) -> _Scores | Skip:
    scores = (*shape_of(inner.q)[:-1], shape_of(inner.kt)[-1])
    if len(shape_of(read)) < 2 or not _broadcasts(shape_of(read), scores):
        return Skip(f"the mask at {node.name} does not have the shape of the scores")
    if dtype_of(mask) != dtype_of(inner.q):
        return Skip(f"the mask is {dtype_of(mask)} and the query {dtype_of(inner.q)}")
    return _through(inner, node, masks=(*inner.masks, mask))


def _not_attention(scores: _Scores, v: Any, dim: int) -> str | None:
    triple = (scores.q, scores.kt, v)
    if not all(is_tensor(x) for x in triple):
        return "query, key and value are not all tensors"
    ndim = len(shape_of(scores.q))
    if ndim < 3 or any(len(shape_of(x)) != ndim for x in triple):
        return "query, key and value do not have the same three or more axes"
    if dim not in (-1, ndim - 1):
        return f"the softmax is over axis {dim}, not over the keys"
    if len({dtype_of(x) for x in triple}) > 1:
        return "query, key and value differ in dtype"
    leading = [shape_of(x)[:-2] for x in triple]
    if not same_shape(leading[0], leading[1]) or not same_shape(leading[0], leading[2]):
        return "query, key and value differ in their leading axes"
    return None


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
    kwargs: dict[str, Any] = {"scale": scale, "enable_gqa": grouped}
    if root.args == args and root.kwargs == kwargs:
        return Skip("everything is written out")
    return graph.call(_SDPA, *args, before=root, like=root, **kwargs)


_TURNS = (aten.reshape.default, aten.transpose.int, aten.permute.default)


def _factored(name: str) -> Pattern:
    """A value times a number, seen as it is or through one or two views."""
    product = AnyOf(
        Call(aten.mul.Tensor, Var(name), Number(f"{name}_factor")),
        Call(aten.div.Tensor, Var(name), Number(f"{name}_divisor")),
    )
    once = Call(_TURNS, product, ...)
    return AnyOf(product, once, Call(_TURNS, once, ...))


@rule(
    AnyOf(
        Call(_SDPA, _factored("q"), Var("k"), Var("v"), ...),
        Call(_SDPA, Var("q"), _factored("k"), Var("v"), ...),
    )
)
def attention_of_scaled_operand(graph: Graph, found: Match) -> Node | Skip:
    """``sdpa(a * q, k, v, scale=s) -> sdpa(q, k, v, scale=a * s)``; so for the keys."""
    root, scale = found.root, graph.operand(found.root, "scale")
    name = "q" if "q_factor" in found.bindings or "q_divisor" in found.bindings else "k"
    if not isinstance(scale, float) or not is_tensor(found[name]):
        return Skip("the scale of the attention, or the value, is no tensor and number")
    if dtype_of(found[name]) != dtype_of(root):
        return Skip("the factor promotes the dtype")
    *views, _ = found.nodes[1:]
    value = found[name]
    for view in reversed(views):
        target, (_, *rest), _ = parts_of(view)
        value = graph.call(target, value, *rest, before=root, like=view)
    scale *= found.get(f"{name}_factor", 1.0) / found.get(f"{name}_divisor", 1.0)
    _, (q, k, *rest), kwargs = parts_of(root)
    pair = (value, k) if name == "q" else (q, value)
    kwargs["scale"] = scale
    return graph.call(_SDPA, *pair, *rest, before=root, like=root, **kwargs)


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
    heads: list[Any] = [shape_of(x)[1] for x in (q, k, v)]
    if heads[1] != heads[2] or heads[0] % heads[1] or root.kwargs.get("enable_gqa"):
        return Skip(f"{heads[0]} heads of queries are no groups for {heads[1:]} heads")
    _, (_, _, _, *rest), kwargs = parts_of(root)
    kwargs["enable_gqa"] = True
    return graph.call(_SDPA, q, k, v, *rest, before=root, like=root, **kwargs)


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


ATTENTION: tuple[Rule, ...] = (
    attention_from_softmax,
    attention_of_scaled_operand,
    attention_of_repeated_heads,
)
ATTENTION_SPELLING: tuple[Rule, ...] = (attention_in_full,)
