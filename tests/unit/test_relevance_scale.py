"""Relevance in numbers of 16 bits: seeds of all kinds are scaled, results are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.passes.relevance.emit import SEED, emit
from lamella.passes.relevance.relevance_graph import SCALE
from lamella.passes.relevance.request import Request, Tap
from lamella.passes.relevance.seeds import At, Contrastive, Difference, Logit, SoftmaxGradient
from lamella.passes.relevance.taps import amounts_of
from lamella.rewrite.canonicalize import canonicalize
from lamella.rules.relevance.presets import PRESETS


class Shrinking(nn.Module):
    """Three layers; the slopes of the first are so small that float16 has no number for them."""

    def __init__(self, factor: float, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.third = (
            nn.Parameter(torch.randn(*size, generator=generator).to(dtype))
            for size in ((6, 5), (6, 6), (4, 6))
        )
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(nn.functional.linear(x, self.first)) * self.factor
        return nn.functional.linear(nn.functional.linear(hidden, self.second), self.third)


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
SEEDS = {
    "logit": Logit(1),
    "largest": Logit(),
    "contrastive": Contrastive(2),
    "difference": Difference(0, 3),
    "softmax": SoftmaxGradient(1),
    "entry": At((1, 2)),
}


def graph_of(factor: float, dtype: torch.dtype) -> Graph:
    graph = capture_module(Shrinking(factor, dtype), {"x": X.to(dtype)}, dynamic=False)
    canonicalize(graph)
    return graph


def relevance(graph: Graph, dtype: torch.dtype, **given: Any) -> dict[str, Tensor]:
    first = graph.find(torch.ops.aten.linear.default)[0].name
    kind = given.pop("kind", None)
    tap = Tap("first", (first,), amounts_of)
    made = emit(graph, PRESETS["cp"], Request(seed=kind, taps=(tap,), ledger=True))
    return made(x=X.to(dtype), **given)


@pytest.mark.parametrize("kind", SEEDS)
def test_small_coefficients_are_not_lost(kind: str):
    factor = 2.0**-24
    want = relevance(graph_of(factor, torch.float32), torch.float32, kind=SEEDS[kind])
    got = relevance(graph_of(factor, torch.float16), torch.float16, kind=SEEDS[kind])
    for key in ("relevance.x", "tap.first"):
        assert got[key].dtype != torch.float16
        # The forward and every product are rounded to 11 bits.
        atol = 2e-2 * float(want[key].abs().max())
        torch.testing.assert_close(got[key].to(want[key].dtype), want[key], rtol=0, atol=atol)
        assert bool(want[key].abs().sum() > 0)


def test_a_seed_that_is_given_is_scaled_as_well():
    seed = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).repeat(3, 1)
    graph = graph_of(2.0**-24, torch.float16)
    given = relevance(graph, torch.float16, **{SEED: seed.half()})
    computed = relevance(graph, torch.float16, kind=Logit(1))
    # One is a number more that is rounded on its way into the graph; both are exact here.
    torch.testing.assert_close(given["relevance.x"], computed["relevance.x"], rtol=0, atol=0)


def test_a_seed_that_overflows_is_made_smaller():
    graph = graph_of(64.0, torch.float16)
    want = relevance(graph_of(64.0, torch.float32), torch.float32, kind=Logit(1))
    got = relevance(graph, torch.float16, kind=Logit(1))
    assert bool(got["relevance.x"].isfinite().all())
    atol = 2e-2 * float(want["relevance.x"].abs().max())
    torch.testing.assert_close(got["relevance.x"], want["relevance.x"], rtol=0, atol=atol)
    made = emit(graph, PRESETS["cp"], Request(seed=Logit(1)))
    made.graph.set_weight(made.graph.weight_node(SCALE), torch.tensor(2.0**12))
    assert not bool(made.graph(x=X.half())["relevance.x"].isfinite().all())


def test_bfloat16_needs_no_scale():
    made = emit(graph_of(2.0**-24, torch.bfloat16), PRESETS["cp"], Request(seed=Logit(1)))
    assert not made.is_scaled
    want = relevance(graph_of(2.0**-24, torch.float32), torch.float32, kind=Logit(1))
    got = made(x=X.bfloat16())["relevance.x"]
    assert got.dtype == torch.float32
    # Rounded to 8 bits at every step.
    atol = 0.1 * float(want["relevance.x"].abs().max())
    torch.testing.assert_close(got, want["relevance.x"], rtol=0, atol=atol)
