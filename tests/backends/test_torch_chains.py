"""Chains of integer layers and attention in bfloat16, beside what they stand for."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lamella
from lamella.backends.torch import chain_kernels as chain
from lamella.backends.torch import kernels
from lamella.backends.torch.attention import attention
from lamella.backends.torch.eager import EagerBackend
from lamella.backends.torch.held import ATTENTION, INTEGERS
from lamella.ir.graph import Graph

STEP, ZERO = 0.02, 117

HALF_A_STEP = 2**-8
"""What rounding to bfloat16 changes of a number, relatively."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


# ---- attention ------------------------------------------------------------------------------


def literal_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """Row by row, in float64."""
    result = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        b, h, i = place
        scores = (k[b, h].double() @ q[b, h, i].double()) * scale
        weight = scores.exp() * keep[b]
        result[b, h, i] = (weight / weight.sum()) @ v[b, h].double()
    return result.float()


@pytest.mark.parametrize("sizes", [(3, 2, 5, 9, 8), (2, 3, 7, 7, 32), (1, 1, 1, 300, 4)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bfloat16(sizes: tuple[int, ...], masked: bool) -> None:
    batch, heads, queries, keys, width = sizes
    q = numbers(batch, queries, heads, width).transpose(1, 2)
    k, v = (numbers(batch, heads, keys, width, seed=one) + 3 for one in (1, 2))
    keep = torch.ones(batch, keys, dtype=torch.bool)
    if masked:
        keep[0, keys // 2 :] = False
    got = attention(q, k, v, keep[:, None, None] if masked else None, None)
    want = literal_attention(q, k, v, keep, 1 / math.sqrt(width))
    # Inputs, scores, probabilities and results are rounded, with errors of both signs.
    assert off(got, want) < 3 * HALF_A_STEP
    assert got.dtype is torch.float32


def test_scores_that_are_too_large_for_exponentials_go_another_way() -> None:
    q, k, v = (numbers(2, 2, 6, 8, seed=one) for one in range(3))
    # A row whose scores are all far below those of the center has a sum that is no number of use.
    got = attention(q * 40, k * 40, v, None, 1.0)
    want = functional.scaled_dot_product_attention(q * 40, k * 40, v, scale=1.0)
    assert torch.equal(got, want)


@pytest.mark.parametrize("case", ["float mask", "mask of pairs", "three axes", "nothing counts"])
def test_what_it_does_not_know_is_left_to_pytorch(case: str) -> None:
    q, k, v = (numbers(2, 2, 6, 8, seed=one) for one in range(3))
    mask: Tensor | None = None
    if case == "float mask":
        mask = numbers(2, 1, 1, 6)
    elif case == "mask of pairs":
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
    elif case == "three axes":
        q, k, v = q[0], k[0], v[0]
    else:
        mask = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    want = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(attention(q, k, v, mask, None), want)


# ---- products -------------------------------------------------------------------------------


def test_codes_are_the_nearest_ones() -> None:
    x = numbers(3, 5, 40) * 4
    want = ((x.double() / STEP).round() + ZERO).clamp(0, 255)
    near = ((x.double() / STEP) % 1 - 0.5).abs() < 1e-3
    # Half-way between two codes either of them is right.
    assert torch.equal(chain.codes_of(x, STEP, ZERO)[~near].double(), want[~near])
    assert chain.codes_of(x, STEP, ZERO).shape == x.shape


def test_codes_without_the_quantizer_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(3, 5, 40)
    want = chain.codes_of(x, STEP, ZERO)
    monkeypatch.setattr(chain, "_has_quantizer", lambda: False)
    got = chain.codes_of(x, STEP, ZERO)
    # Division and the product with an inverse round differently where a value is half-way.
    assert (got.int() - want.int()).abs().max() <= 1
    assert float((got != want).float().mean()) < 0.01


@pytest.mark.parametrize("kind", ["float", "bfloat16", "codes"])
@pytest.mark.parametrize(
    "activation", [chain.NONE, chain.RELU, chain.GELU, chain.GELU_TANH, "added"]
)
def test_products_do_what_is_behind_them(kind: str, activation: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-127, 128, (48, 64), generator=generator, dtype=torch.int8)
    codes = torch.randint(0, 256, (2, 5, 64), generator=generator, dtype=torch.uint8)
    scales, bias = numbers(48).abs() * 0.01, numbers(48, seed=2)
    other = numbers(2, 5, 48, seed=3) if activation == "added" else None
    exact = ((codes.double() - ZERO) * STEP) @ (weight.double() * scales.double()[:, None]).t()
    exact = exact + bias
    want = {
        chain.NONE: lambda: exact,
        chain.RELU: lambda: exact.relu(),
        chain.GELU: lambda: functional.gelu(exact),
        chain.GELU_TANH: lambda: functional.gelu(exact, approximate="tanh"),
        "added": lambda: exact + (0 if other is None else other),
    }[activation]()
    name = chain.NONE if activation == "added" else activation
    output = (kind, 0.05, 100) if kind == "codes" else (kind, 1.0, 0)
    packed = kernels.packed_integers(weight)
    got = chain.product(codes, packed, scales, bias, (STEP, ZERO), output, name, other)
    if kind == "codes":
        asked = ((want / 0.05).round() + 100).clamp(0, 255)
        # One code where a value is half-way, up to the rounding of float32.
        assert (got.double() - asked).abs().max() <= 1
        assert float((got.double() != asked).float().mean()) < 0.01
    else:
        # Sums of integers are exact; GELU is a polynomial in oneDNN.
        assert off(got.double(), want) < (2e-6 if kind == "float" else HALF_A_STEP)


def test_what_is_added_may_be_broadcast() -> None:
    weight = torch.ones(4, 8, dtype=torch.int8)
    codes = torch.full((2, 3, 8), 120, dtype=torch.uint8)
    arguments = (kernels.packed_integers(weight), torch.ones(4), None, (1.0, 118))
    got = chain.product(codes, *arguments, other=torch.arange(4.0))
    assert torch.equal(got, (16.0 + torch.arange(4.0)).expand(2, 3, 4))


# ---- chains ---------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer of an encoder, whose hidden values may be wanted too."""

    def __init__(self, *, hidden_wanted: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(32, 32, bias=i != 1) for i in range(4)])
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(2)])
        self.hidden_wanted = hidden_wanted

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x)
        q, k, v = (part(x).unflatten(-1, (4, 8)).transpose(1, 2) for part in self.parts[:3])
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norms[1](self.parts[3](mixed) + x)
        hidden = functional.gelu(self.up(x))
        result = x + self.down(hidden)
        return result + hidden.mean() if self.hidden_wanted else result


PASSES = ["quantize-weights bits=8 min_size=1 min_rows=0 activations=int8-tensor", "fix-ranges"]


def quantized(model: nn.Module) -> tuple[Graph, Tensor]:
    x = numbers(2, 6, 32, seed=5)
    graph = lamella.capture(model.eval(), (x,))
    lamella.transform(graph, PASSES, samples=[{"x": numbers(4, 6, 32, seed=6)}])
    return graph, x


def functions(module: torch.fx.GraphModule) -> Counter[str]:
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    return Counter(getattr(node.target, "__name__", str(node.target)) for node in calls)


def test_a_layer_of_an_encoder_is_four_products(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph, x = quantized(Layer())
    executable = EagerBackend(bfloat16=True, native=False).lower(graph)
    assert executable.lowered.counts == {INTEGERS: 6, ATTENTION: 1}
    found = functions(executable.lowered.module)
    assert {name: found[name] for name in ("product", "codes_of", "attention")} == {
        "product": 4,
        "codes_of": 3,
        "attention": 1,
    }
    assert not any(name.startswith(("gelu", "add")) for name in found)
    # Attention in bfloat16 moves some codes by one.
    assert off(executable(x), graph(x)) < 0.02
    assert off(executable(x), graph(x)) > 0
    executable.save(tmp_path / "out")
    assert torch.equal(lamella.load(tmp_path / "out")(x), executable(x))


def test_what_others_read_is_not_drawn_in() -> None:
    torch.manual_seed(0)
    graph, x = quantized(Layer(hidden_wanted=True))
    executable = EagerBackend(bfloat16=True, native=False).lower(graph)
    found = functions(executable.lowered.module)
    assert found["codes_of"] == 4
    assert off(executable(x), graph(x)) < 0.02


def test_the_reference_keeps_its_operators() -> None:
    torch.manual_seed(0)
    graph, x = quantized(Layer())
    executable = EagerBackend().lower(graph)
    assert functions(executable.lowered.module)["product"] == 0
    assert off(executable(x), graph(x)) < 1e-5
