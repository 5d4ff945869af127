"""Activations written out: `aten.silu`, `aten.gelu`, `aten.mish` and their like."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import dtype_of, is_tensor
from lamella.rewrite.pattern import AnyOf, Call, Literal, Match, Pattern, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten

_X = Var("x")


def _product(*factors: Any) -> Pattern:
    """A product of three factors, however it is bracketed and ordered."""
    one, two, three = factors
    return AnyOf(
        Call(aten.mul.Tensor, Call(aten.mul.Tensor, one, two), three),
        Call(aten.mul.Tensor, Call(aten.mul.Tensor, one, three), two),
        Call(aten.mul.Tensor, one, Call(aten.mul.Tensor, two, three)),
    )


def _halved(x: Pattern, other: Pattern) -> Pattern:
    """``0.5 * x * other``, also as a division by 2."""
    return AnyOf(
        _product(x, other, 0.5),
        Call(aten.mul.Tensor, Call(aten.div.Tensor, x, 2), other),
        Call(aten.div.Tensor, Call(aten.mul.Tensor, x, other), 2),
    )


# Models round the constants to five digits or more.
_ROOT = Literal(math.sqrt(2), 1e-5)
_INVERSE_ROOT = Literal(math.sqrt(0.5), 1e-5)
_SLOPE = Literal(math.sqrt(2 / math.pi), 1e-5)
_CUBIC = Literal(0.044715, 1e-5)

_ERF = Call(
    aten.erf.default,
    AnyOf(Call(aten.mul.Tensor, _X, _INVERSE_ROOT), Call(aten.div.Tensor, _X, _ROOT)),
)
_SQUARE = AnyOf(Call(aten.pow.Tensor_Scalar, _X, 2), Call(aten.mul.Tensor, _X, _X))
_CUBE = AnyOf(Call(aten.pow.Tensor_Scalar, _X, 3), Call(aten.mul.Tensor, _X, _SQUARE))
_INNER = AnyOf(
    Call(
        aten.mul.Tensor,
        Call(aten.add.Tensor, _X, Call(aten.mul.Tensor, _CUBE, _CUBIC)),
        _SLOPE,
    ),
    _product(
        _X,
        _SLOPE,
        Call(
            aten.add.Tensor,
            AnyOf(_product(_X, _X, _CUBIC), Call(aten.mul.Tensor, _SQUARE, _CUBIC)),
            1,
        ),
    ),
)
_TANH = Call(aten.tanh.default, _INNER)


@rule(_halved(_X, Call(aten.add.Tensor, _ERF, 1)))
def gelu_from_erf(graph: Graph, found: Match) -> Node | Skip:
    """``0.5 * x * (1 + erf(x / sqrt(2))) -> gelu(x)``."""
    return _activation(graph, found, aten.gelu.default)


@rule(_halved(_X, Call(aten.add.Tensor, _TANH, 1)))
def gelu_from_tanh(graph: Graph, found: Match) -> Node | Skip:
    """``0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) -> gelu(x, "tanh")``."""
    return _activation(graph, found, aten.gelu.default, approximate="tanh")


@rule(Call(aten.mul.Tensor, _X, Call(aten.sigmoid.default, _X)))
def silu_from_sigmoid(graph: Graph, found: Match) -> Node | Skip:
    """``x * sigmoid(x) -> silu(x)``."""
    return _activation(graph, found, aten.silu.default)


@rule(Call(aten.mul.Tensor, _X, Call(aten.tanh.default, Call(aten.softplus.default, _X))))
def mish_from_softplus(graph: Graph, found: Match) -> Node | Skip:
    """``x * tanh(softplus(x)) -> mish(x)``."""
    return _activation(graph, found, aten.mish.default)


_SIX = Call((aten.hardtanh.default, aten.clamp.default), Call(aten.add.Tensor, _X, 3), 0, 6)


@rule(
    AnyOf(
        Call(aten.div.Tensor, Call(aten.mul.Tensor, _X, _SIX), 6),
        Call(aten.mul.Tensor, _X, Call(aten.div.Tensor, _SIX, 6)),
        Call(aten.mul.Tensor, _X, Call(aten.hardsigmoid.default, _X)),
    )
)
def hardswish_from_clamp(graph: Graph, found: Match) -> Node | Skip:
    """``x * clamp(x + 3, 0, 6) / 6 -> hardswish(x)``."""
    return _activation(graph, found, aten.hardswish.default)


def _activation(graph: Graph, found: Match, target: Any, **kwargs: Any) -> Node | Skip:
    x, root = found["x"], found.root
    if not is_tensor(x) or not dtype_of(x).is_floating_point:
        return Skip("the input is no floating-point tensor")
    if dtype_of(x) != dtype_of(root):
        return Skip("the result has another dtype than the input")
    return graph.call(target, x, before=root, like=root, **kwargs)


@rule(Call(aten.gelu.default, Var("x"), approximate=Var("kind")))
def gelu_by_keyword(graph: Graph, found: Match) -> Node | Skip:
    """``gelu(x) -> gelu(x, approximate="none")``: the kind is always written out."""
    root = found.root
    if "approximate" in root.kwargs:
        return Skip("the kind is written out")
    kind = found["kind"]
    return graph.call(aten.gelu.default, found["x"], approximate=kind, before=root, like=root)


ACTIVATIONS: tuple[Rule, ...] = (
    gelu_from_erf,
    gelu_from_tanh,
    silu_from_sigmoid,
    mish_from_softplus,
    hardswish_from_clamp,
)
ACTIVATION_SPELLING: tuple[Rule, ...] = (gelu_by_keyword,)
