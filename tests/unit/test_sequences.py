"""Which models treat the sequences of a batch each for itself; batches that are cut to fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lamella.data import Samples
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, dequantized
from lamella.passes.base import Analyses
from lamella.passes.scores.attention import attention
from lamella.passes.scores.fisher import Fisher
from lamella.passes.scores.gradients import GradientRun
from lamella.passes.scores.sequences import Sequences, find_sequences
from lamella.passes.scores.target import loss_target, random_signs, sequence_generators
from lamella.passes.sites import find_sites
from lamella.rewrite.canonicalize import canonicalize


class Between(nn.Module):
    """Two linear layers with something between them that may look across a batch."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 5)
        self.between = between

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(self.between(self.first(x)))}


def turned(x: Tensor) -> Tensor:
    """Tokens first and back, as some libraries lay sequences out."""
    return functional.gelu(x.transpose(0, 1)).transpose(0, 1)


def joined(x: Tensor) -> Tensor:
    """Rows of all sequences in one matrix and back."""
    return x.reshape(-1, 6).softmax(-1).reshape(x.shape)


def joined_by_token(x: Tensor) -> Tensor:
    """A matrix whose rows are by token: its size is that of `joined`."""
    batch, length, width = x.shape
    rows = x.transpose(0, 1).reshape(-1, width)
    return (rows[:, None] * rows[..., None]).sum(1).reshape(length, batch, width).transpose(0, 1)


def heads_in_batch(x: Tensor) -> Tensor:
    """Heads beside sequences in the first axis."""
    batch, length, _ = x.shape
    heads = x.reshape(batch, length, 2, 3).transpose(1, 2).reshape(batch * 2, length, 3)
    heads = torch.matmul(heads @ heads.transpose(1, 2), heads)
    return heads.reshape(batch, 2, length, 3).transpose(1, 2).reshape(x.shape)


APART: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": turned,
    "joined": joined,
    "heads": heads_in_batch,
    "rolled in a sequence": lambda x: x.roll(1, 1),
}
MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "by token": joined_by_token,
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "running": lambda x: x.cumsum(0),
    "softmax": lambda x: x.softmax(0),
    "rolled": lambda x: x.roll(1, 0),
    "turned round": lambda x: x.flip(0),
    "sorted": lambda x: x.sort(0).values,
    "repeated": lambda x: x.repeat(2, 1, 1)[: x.shape[0]],
    "joined": lambda x: torch.cat((x, x))[1 : x.shape[0] + 1],
    "picked": lambda x: x[x.sum((1, 2)).argsort()],
}


def graph_of(between: Callable[[Tensor], Tensor]) -> tuple[Between, Graph]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Between(between)
    graph = capture_module(model, {"x": torch.randn(2, 3, 6)})
    canonicalize(graph)
    return model, graph


def found(graph: Graph) -> Sequences | str:
    return find_sequences(graph, loss_target(graph), find_sites(graph))


@pytest.mark.parametrize("kind", MIXED)
def test_what_mixes_sequences_is_named(kind: str) -> None:
    _, graph = graph_of(MIXED[kind])
    assert "may mix sequences" in str(found(graph))


@pytest.mark.parametrize("kind", APART)
def test_gradients_of_a_batch_are_those_of_each_sequence(kind: str) -> None:
    model, graph = graph_of(APART[kind])
    assert isinstance(found(graph), Sequences)
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
    fisher = Fisher((Format(2, 32),), int8_activations=False, draws=1)
    together = Analyses(graph, Samples.of([{"x": x}])).get(fisher).interactions
    assert together is not None
    # By the definition: the gradient of one sequence alone, by autograd.
    weight = model.first.weight
    generators = sequence_generators(0)
    error = fisher_error(weight.detach())
    for row, got in zip(x, together.projections["first.weight"][Format(2, 32)], strict=True):
        logits = model(row[None])["logits"][0]
        signs = random_signs(3, 5, next(generators))
        shares = logits.detach().softmax(-1)
        seed = shares.sqrt() * signs
        seed = seed - shares * seed.sum(-1, keepdim=True)
        gradient = torch.autograd.grad((logits * seed).sum(), weight)[0]
        expected = float((gradient * error).sum()) * (0.5 / 12) ** 0.5
        # Float32 sums of a hundred products.
        assert float(got) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def fisher_error(weight: Tensor) -> Tensor:
    """What rounding does to a weight."""
    return dequantized(weight, Format(2, 32)) - weight


def test_batches_are_cut_to_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = graph_of(joined)
    run = GradientRun(graph, loss_target(graph), find_sites(graph), [])
    samples = Samples.of([{"x": torch.randn(5, 3, 6)}, {"x": torch.randn(2, 3, 6)}])
    assert [len(batch["x"]) for batch in run.batches(samples)] == [5, 2]
    # A sequence has three tokens of 6 + 6 + 5 and more float32 numbers.
    monkeypatch.setattr("lamella.passes.scores.gradients._HELD_BYTES", 2 * 3 * 24 * 4)
    assert [len(batch["x"]) for batch in run.batches(samples)] == [2, 2, 1, 2]
    monkeypatch.setattr("lamella.passes.scores.gradients._HELD_BYTES", 1)
    assert [len(batch["x"]) for batch in run.batches(samples)] == [1] * 7


def test_signs_of_a_sequence_do_not_hang_on_others() -> None:
    first, second = (next(sequence_generators(seed)) for seed in (0, 0))
    one, other = random_signs(3, 5, first), random_signs(5, 5, second)
    assert set(one.flatten().tolist()) == {1.0, -1.0}
    assert not torch.equal(one, random_signs(3, 5, first))
    assert other.shape == (5, 5)
    many = random_signs(300, 301, first)
    # The mean of 90,300 signs spreads by 1/300, that of products of neighbors likewise.
    assert abs(float(many.mean())) < 0.014
    assert abs(float((many[1:] * many[:-1]).mean())) < 0.014


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "seen": {"attn_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool).tril(1)},
    "added": {"attn_mask": torch.linspace(-4, 4, 25).reshape(1, 1, 5, 5)},
    "nothing seen": {"attn_mask": torch.zeros(2, 1, 5, 5, dtype=torch.bool)},
    "fewer keys": {"enable_gqa": True, "scale": 0.3},
}


@pytest.mark.parametrize("kind", MASKS)
def test_attention_as_products_is_the_operator(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = 2 if kind == "fewer keys" else 4
    shapes = [(2, 4, 5, 8), (2, heads, 5, 8), (2, heads, 5, 8)]
    one = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    more: dict[str, Any] = {k: v.double() if kind == "added" else v for k, v in MASKS[kind].items()}
    results: list[list[Tensor]] = []
    operator = torch.ops.aten.scaled_dot_product_attention.default
    kernels: list[Callable[..., Tensor]] = [attention, operator]
    for attend in kernels:
        leaves = [value.clone().requires_grad_() for value in one]
        result = attend(*leaves, **more)
        gradients = torch.autograd.grad(result.square().sum(), leaves)
        results.append([result, *gradients])
    for got, expected in zip(*results, strict=True):
        # Both are float64.
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
