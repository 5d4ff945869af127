"""Norms and activations written out become one operator; near misses say why not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.rewrite.canonical.activations import silu_from_sigmoid
from lamella.rewrite.canonical.norms import rms_norm_without_weight
from lamella.rewrite.canonicalize import canonicalize
from tests.unit.written import canonical, graph_of, operators, random

aten = torch.ops.aten
X = random(2, 3, 8)
W, B = random(8, seed=1), random(8, seed=2)


def inverse(x: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


RMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight on the left": lambda x, w: w * (x * inverse(x)),
    "weight on the right": lambda x, w: (inverse(x) * x) * w,
    "division": lambda x, w: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w,
    "power": lambda x, w: w * (x * ((x.square()).mean(-1, keepdim=True) + 1e-6) ** -0.5),
    "one over root": lambda x, w: w * (x * (1.0 / torch.sqrt(x.pow(2).mean(-1, True) + 1e-6))),
    "no-op casts": lambda x, w: w * (x.double() * inverse(x.double())).to(x.dtype),
}


@pytest.mark.parametrize("name", RMS)
def test_rms_norm_is_raised(name: str) -> None:
    graph, _ = canonical(RMS[name], X, w=W)
    (norm,) = graph.find(aten.rms_norm.default)
    assert operators(graph) == {"rms_norm": 1}
    assert graph.operand(norm, "normalized_shape") == [8]
    assert graph.operand(norm, "weight").target == "w"
    assert graph.operand(norm, "eps") == 1e-6


def test_one_plus_weight_is_folded_into_a_new_weight() -> None:
    graph, _ = canonical(lambda x, w: x * inverse(x) * (1.0 + w), X, w=W)
    (norm,) = graph.find(aten.rms_norm.default)
    assert operators(graph) == {"rms_norm": 1}
    assert graph.operand(norm, "weight").target == "w_folded"
    torch.testing.assert_close(graph.weight("w_folded"), 1 + W, rtol=0, atol=0)


def test_one_plus_weight_stays_a_node_when_the_weight_is_not_loaded() -> None:
    graph = graph_of(lambda x, w: x * inverse(x) * (1.0 + w), X, w=W)
    graph.set_weight(graph.weight_node("w"), torch.empty(8, dtype=W.dtype, device="meta"))
    canonicalize(graph)
    assert operators(graph) == {"rms_norm": 1, "add": 1}


def test_rms_norm_without_weight_and_over_groups() -> None:
    graph, _ = canonical(
        lambda x, w: w * (x * inverse(x)).flatten(-2), random(2, 3, 3, 4), w=random(12)
    )
    assert operators(graph)["rms_norm"] == 1
    assert operators(graph)["mul"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_that_go_through_single_precision_are_raised(dtype: torch.dtype) -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return w * (wide * inverse(wide)).to(x.dtype)

    graph, _ = canonical(norm, X.to(dtype), w=W.to(dtype))
    assert operators(graph) == {"rms_norm": 1}


def test_gemma_norms_multiply_before_the_cast() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        return (wide * inverse(wide) * (1.0 + w.float())).type_as(x)

    graph, _ = canonical(norm, X.bfloat16(), w=W.bfloat16())
    # The folded weight is in single precision, and so the casts stay around the norm.
    assert operators(graph) == {"to": 2, "rms_norm": 1}


def test_near_misses_of_rms_norm_are_explained() -> None:
    graph, report = canonical(lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6), X)
    assert "rms_norm" not in operators(graph)
    assert [str(miss) for miss in report.near_misses] == [
        "rms_norm_without_weight at mul: the mean over axis 1 is not over a last axis of fixed size"
    ]
    other = graph_of(lambda x: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6), X)
    assert rms_norm_without_weight.explain(other, other.outputs[0]) == (
        "rms_norm_without_weight does not match at mul: "
        "abs_1 (aten.abs.default) is not aten.pow.Tensor_Scalar"
    )


LAYER: dict[str, Callable[..., Tensor]] = {
    "by parts": lambda x, w, b: (
        (x - x.mean(-1, True)) / torch.sqrt((x - x.mean(-1, True)).pow(2).mean(-1, True) + 1e-5) * w
        + b
    ),
    "by variance": lambda x, w, b: (
        b + w * ((x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5))
    ),
}


@pytest.mark.parametrize("name", LAYER)
def test_layer_norm_is_raised(name: str) -> None:
    graph, _ = canonical(LAYER[name], X, w=W, b=B)
    (norm,) = graph.find(aten.layer_norm.default)
    assert operators(graph) == {"layer_norm": 1}
    assert [graph.operand(norm, key).target for key in ("weight", "bias")] == ["w", "b"]


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "silu": (lambda x: x * torch.sigmoid(x), "silu"),
    "silu swapped": (lambda x: torch.sigmoid(x) * x, "silu"),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), "mish"),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, "hardswish"),
    "gelu half first": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), "gelu"),
    "gelu half last": (lambda x: x * (torch.erf(x * 0.7071067811865475) + 1) * 0.5, "gelu"),
    "gelu inner half": (lambda x: x * (0.5 * (1 + torch.erf(x / 1.41421))), "gelu"),
    "gelu by two": (lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2, "gelu"),
    "gelu tanh": (
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu",
    ),
    "gelu fast": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
        "gelu",
    ),
    "gelu cube by products": (
        lambda x: x * 0.5 * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x)))),
        "gelu",
    ),
    "gelu plain": (lambda x: F.gelu(x, approximate="tanh"), "gelu"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_raised(name: str) -> None:
    function, expected = ACTIVATIONS[name]
    # Five digits of sqrt(2) move the result by 1e-6.
    if name in ("gelu inner half", "gelu fast"):
        graph = graph_of(function, X)
        canonicalize(graph)
        torch.testing.assert_close(graph(a=X), function(X), rtol=1e-5, atol=1e-5)
    else:
        graph, _ = canonical(function, X)
    assert operators(graph) == {expected: 1}


def test_tanh_gelu_knows_its_kind() -> None:
    graph, _ = canonical(ACTIVATIONS["gelu tanh"][0], X)
    (node,) = graph.find(aten.gelu.default)
    assert graph.operand(node, "approximate") == "tanh"


def test_quick_gelu_is_no_silu() -> None:
    graph, _ = canonical(lambda x: x * torch.sigmoid(1.702 * x), X)
    assert operators(graph) == {"mul": 2, "sigmoid": 1}
    assert silu_from_sigmoid.explain(graph, graph.outputs[0]).startswith(
        "silu_from_sigmoid does not match at mul_1: mul (aten.mul.Tensor) is not"
    )
