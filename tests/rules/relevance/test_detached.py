"""The presets attnlrp and cp beside the gradient-times-input form of their papers.

The reference library of AttnLRP does not run with the transformers that Lamella needs for all
of these models, so that its published formulas are written down here once more, slowly: products
and activations are computed so that autograd has the slope of the rule. Stopped factors are
detached, halves are ``x/2 + detach(x/2)``, an activation is ``x * detach(f(x)/x)``.

References:
    [Achtibat2024] (identity and uniform rules), [Ali2022] (layer norm and attention).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.operators import REFERENCE
from lamella.ir.ops import aten
from lamella.passes.relevance.emit import emit
from lamella.rules.relevance.presets import PRESETS
from tests.conftest import family_of
from tests.zoo.relevance_runs import double_inputs, in_double, seed_of


def half(value: Tensor) -> Tensor:
    return value / 2 + (value / 2).detach()


def rms_norm(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps).detach() * weight


def layer_norm(x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float, *_: Any):
    centred = x - x.mean(-1, keepdim=True)
    deviation = ((centred**2).mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation.detach() * weight + bias


def identity(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x * (function(x, *args, **kwargs) / x).detach()

    return apply


def attention(stop: bool) -> Callable[..., Tensor]:
    def apply(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *_: Any, **more: Any
    ) -> Tensor:
        if stop:
            q, k = q.detach(), k.detach()
        if more.get("enable_gqa"):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scale = more.get("scale") or q.shape[-1] ** -0.5
        scores = q @ k.mT * scale
        scores = scores if stop else half(scores)
        if mask is not None:
            scores = (
                scores.masked_fill(~mask, -torch.inf)
                if mask.dtype == torch.bool
                else (scores + mask)
            )
        weights = torch.softmax(scores, -1).nan_to_num()
        return weights @ v if stop else half(weights @ v)

    return apply


class Detached(fx.Interpreter):
    """Runs a graph with other slopes; remembers the value of an embedding or an input."""

    def __init__(self, graph: Graph, source: str, stop: bool) -> None:
        super().__init__(graph.module, garbage_collect_values=False)
        self.source, self.stop = source, stop
        self.instead: dict[Any, Callable[..., Any]] = {
            aten.rms_norm.default: rms_norm,
            aten.layer_norm.default: layer_norm,
            aten.silu.default: identity(aten.silu.default),
            aten.gelu.default: identity(aten.gelu.default),
            aten.tanh.default: identity(aten.tanh.default),
            aten.scaled_dot_product_attention.default: attention(stop),
        }

    def run_node(self, n: Node) -> Any:
        gate = n.args[0] if n.args else None
        if n.target is aten.mul.Tensor and getattr(gate, "target", None) is aten.silu.default:
            left, right = self.env[gate], self.env[n.args[1]]
            return left.detach() * right if self.stop else half(left * right)
        value = super().run_node(n)
        if n.name == self.source:
            self.found = value.detach().requires_grad_()
            return self.found
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        other = self.instead.get(target) or REFERENCE.get(target, target)
        return super().call_function(other, args, kwargs)


@pytest.mark.parametrize("preset", ["attnlrp", "cp"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "vit"])
def test_presets_are_their_published_formulas(
    family: str, preset: str, captured: Callable[[str], Graph]
):
    graph = captured(family)
    made = emit(graph, PRESETS[preset])
    ((name, source),) = made.sources.items()
    inputs, seed = double_inputs(family_of(family).inputs()), seed_of(family)
    got = in_double(made.graph)(**inputs, seed=seed)[f"relevance.{name}"]
    running = Detached(in_double(graph), source, stop=preset == "cp")
    with torch.enable_grad():
        output = running.run(*graph.signature.flatten((), inputs))[0]
        (slope,) = torch.autograd.grad(output, running.found, seed)
    want = (running.found * slope).detach()
    # A few hundred operations in float64; the bound of issue 4.
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))
