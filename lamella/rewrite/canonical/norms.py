"""Normalizations written out: `aten.rms_norm` and `aten.layer_norm`."""

from __future__ import annotations

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import dtype_of, is_tensor, same_extent, shape_of
from lamella.rewrite.pattern import AnyOf, Call, Cast, Match, Number, Pattern, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten


def _squared(x: Pattern) -> Pattern:
    return AnyOf(Call(aten.pow.Tensor_Scalar, x, 2), Call(aten.mul.Tensor, x, x))


def _divided(x: Pattern, variance: Pattern) -> Pattern:
    """``x / sqrt(variance + eps)`` in its spellings."""
    shifted = Call(aten.add.Tensor, variance, Number("eps"))
    root = Call(aten.sqrt.default, shifted)
    inverse = AnyOf(
        Call(aten.rsqrt.default, shifted),
        Call(aten.pow.Tensor_Scalar, shifted, -0.5),
        Call(aten.reciprocal.default, root),
        Call(aten.div.Tensor, 1.0, root),
    )
    deviation = AnyOf(root, Call(aten.pow.Tensor_Scalar, shifted, 0.5))
    return AnyOf(Call(aten.mul.Tensor, x, inverse), Call(aten.div.Tensor, x, deviation))


def _mean(x: Pattern) -> Pattern:
    return Call(aten.mean.dim, x, [Var("dim")], True)


@rule(_divided(Var("x"), _mean(_squared(Var("x")))))
def rms_norm_without_weight(graph: Graph, found: Match) -> Node | Skip:
    """``x / sqrt(mean(x^2) + eps) -> rms_norm(x, [n], None, eps)``, over the last axis."""
    x, root = found["x"], found.root
    size = _normalized_size(x, found["dim"])
    if size is None:
        return Skip(f"the mean over axis {found['dim']} is not over a last axis of fixed size")
    return graph.call(aten.rms_norm.default, x, [size], None, found["eps"], before=root, like=root)


@rule(
    Call(
        aten.mul.Tensor,
        Cast(Call(aten.rms_norm.default, Var("x"), Var("shape"), None, Var("eps"))),
        Var("w"),
    )
)
def rms_norm_with_weight(graph: Graph, found: Match) -> Node | Skip:
    """``rms_norm(x, [n]) * w -> rms_norm(x, [n], w)``, with the cast moved behind.

    In half precision the product is rounded once instead of twice.
    """
    x, w, root = found["x"], found["w"], found.root
    problem = _not_per_channel(w, found["shape"])
    if problem:
        return Skip(problem)
    if dtype_of(w) != dtype_of(x):
        if len(found.nodes) == 2:
            return Skip(f"{w.name} is {dtype_of(w)} and the input {dtype_of(x)}")
        w = graph.call(aten.to.dtype, w, dtype_of(x), before=root)
    args = (x, found["shape"], w, found["eps"])
    if dtype_of(x) == dtype_of(root):
        return graph.call(aten.rms_norm.default, *args, before=root, like=root)
    made = graph.call(aten.rms_norm.default, *args, before=root)
    return graph.call(aten.to.dtype, made, dtype_of(root), before=root, like=root)


@rule(
    Call(
        aten.to.dtype,
        Call(
            aten.rms_norm.default,
            Call(aten.to.dtype, Var("x"), Var("wide")),
            Var("shape"),
            Var("w"),
            Var("eps"),
        ),
        Var("narrow"),
    )
)
def rms_norm_between_casts(graph: Graph, found: Match) -> Node | Skip:
    """``to(rms_norm(to(x, float32), [n], to(w, float32)), dtype of x) -> rms_norm(x, [n], w)``.

    The operator computes in single precision inside.
    """
    x, w, root = found["x"], found["w"], found.root
    if not is_tensor(x) or dtype_of(x) != found["narrow"]:
        return Skip("the result has another dtype than the input")
    if found["wide"] != torch.float32 or dtype_of(x) not in (torch.float16, torch.bfloat16):
        return Skip(f"a norm of {dtype_of(x)} is not computed in {found['wide']} inside")
    if w is not None:
        if w.target is not aten.to.dtype or dtype_of(w.args[0]) != dtype_of(x):
            return Skip(f"the weight is not {dtype_of(x)}")
        w = w.args[0]
    return graph.call(
        aten.rms_norm.default, x, found["shape"], w, found["eps"], before=root, like=root
    )


_CENTERED = Call(aten.sub.Tensor, Var("x"), Call(aten.mean.dim, Var("x"), [Var("dim")], True))


@rule(
    AnyOf(
        _divided(_CENTERED, _mean(_squared(_CENTERED))),
        _divided(
            _CENTERED,
            Call(aten.var.correction, Var("x"), [Var("dim")], correction=0, keepdim=True),
        ),
    )
)
def layer_norm_without_weight(graph: Graph, found: Match) -> Node | Skip:
    """``(x - mean(x)) / sqrt(var(x) + eps) -> layer_norm(x, [n], None, None, eps)``."""
    x, root = found["x"], found.root
    size = _normalized_size(x, found["dim"])
    if size is None:
        return Skip(f"the mean over axis {found['dim']} is not over a last axis of fixed size")
    return graph.call(
        aten.layer_norm.default, x, [size], None, None, found["eps"], before=root, like=root
    )


@rule(
    Call(
        aten.mul.Tensor,
        Call(aten.layer_norm.default, Var("x"), Var("shape"), None, None, Var("eps"), ...),
        Var("w"),
    )
)
def layer_norm_with_weight(graph: Graph, found: Match) -> Node | Skip:
    """``layer_norm(x, [n]) * w -> layer_norm(x, [n], w)``."""
    x, w, root = found["x"], found["w"], found.root
    problem = _not_per_channel(w, found["shape"])
    if problem or dtype_of(w) != dtype_of(x):
        return Skip(problem or f"{w.name} is {dtype_of(w)} and the input {dtype_of(x)}")
    shape, eps = found["shape"], found["eps"]
    return graph.call(aten.layer_norm.default, x, shape, w, None, eps, before=root, like=root)


@rule(
    Call(
        aten.add.Tensor,
        Call(aten.layer_norm.default, Var("x"), Var("shape"), Var("w"), None, Var("eps"), ...),
        Var("b"),
    )
)
def layer_norm_with_bias(graph: Graph, found: Match) -> Node | Skip:
    """``layer_norm(x, [n], w) + b -> layer_norm(x, [n], w, b)``, where `b` is a weight."""
    x, bias, root = found["x"], found["b"], found.root
    problem = _not_per_channel(bias, found["shape"])
    if problem or dtype_of(bias) != dtype_of(x):
        return Skip(problem or f"{bias.name} is {dtype_of(bias)} and the input {dtype_of(x)}")
    args = (x, found["shape"], found["w"], bias, found["eps"])
    return graph.call(aten.layer_norm.default, *args, before=root, like=root)


def _normalized_size(x: Node, dim: int) -> int | None:
    """The size of the last axis, if it is fixed and `dim` is that axis."""
    shape = shape_of(x)
    size = shape[-1]
    return size if dim in (-1, len(shape) - 1) and isinstance(size, int) else None


def _not_per_channel(w: object, normalized: list[int]) -> str | None:
    """Why `w` is no vector with one value per channel, or None if it is."""
    if not isinstance(w, Node) or not is_tensor(w):
        return "the other factor is a number"
    if len(shape_of(w)) != 1 or not same_extent(shape_of(w)[0], normalized[0]):
        return f"{w.name} {list(shape_of(w))} does not have one value per channel"
    return None


NORMS: tuple[Rule, ...] = (
    rms_norm_without_weight,
    rms_norm_with_weight,
    rms_norm_between_casts,
    layer_norm_without_weight,
    layer_norm_with_weight,
    layer_norm_with_bias,
)
