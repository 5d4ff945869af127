"""Scores from second derivatives: against exact Hessians and plain sums over tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lamella.data import Samples
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.operators import round_to_int8
from lamella.ir.quantize import Format, dequantized
from lamella.passes.base import Analyses
from lamella.passes.scores import bit_score
from lamella.passes.scores.fisher import Fisher
from lamella.passes.scores.fisher_gram import FisherGram
from lamella.passes.scores.hawq import Hawq, HawqEigenvalue
from lamella.passes.scores.hessian import Hessian, largest_eigenvalues, traces
from lamella.passes.scores.output_gradients import OutputGradients
from lamella.passes.scores.target import drawn_loss, loss_target, sequence_generators
from lamella.passes.sites import find_sites

Captured = Callable[[str], Graph]


class Attending(nn.Module):
    """A classifier of tokens with one head of attention, small enough for its exact Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.query = nn.Linear(4, 4, bias=False)
        self.value = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.table(ids)
        q, v = self.query(x)[:, None], self.value(x)[:, None]
        if torch.compiler.is_exporting():
            y = functional.scaled_dot_product_attention(q, q, v, is_causal=True)[:, 0]
        else:  # By its definition: forward mode has no rule for the fused kernel.
            hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
            scores = (q @ q.mT / 2).masked_fill(hidden, -torch.inf)
            y = (scores.softmax(-1) @ v)[:, 0]
        return {"logits": self.head(functional.gelu(y) + x)}


@pytest.fixture
def attending() -> tuple[Attending, Graph, Tensor]:
    torch.manual_seed(0)
    model = Attending().double()
    ids = torch.randint(0, 5, (3, 6))
    return model, capture_module(model, {"ids": ids}), ids


def exact_hessian(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, slice]]:
    """Second derivatives of the mean KL per token from the model to itself, by definition.

    Returns:
        The matrix over all weights, and the place of each.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    reference = torch.func.functional_call(model, parameters, (ids,))["logits"].log_softmax(-1)
    names = [name for name, p in parameters.items() if p.ndim == 2]
    sizes = [parameters[name].numel() for name in names]

    def divergence(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        weights = {name: part.reshape(parameters[name].shape) for name, part in parts}
        logits = torch.func.functional_call(model, parameters | weights, (ids,))["logits"]
        return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1).mean()

    ends = list(itertools.accumulate(sizes, initial=0))
    places = {
        name: slice(*pair) for name, pair in zip(names, itertools.pairwise(ends), strict=True)
    }
    flat = torch.cat([parameters[name].flatten() for name in names])
    return torch.func.hessian(divergence)(flat), places


@pytest.fixture
def hessian(attending: tuple[Attending, Graph, Tensor]) -> Hessian:
    _, graph, ids = attending
    batches = [{"ids": ids[:2]}, {"ids": ids[2:]}]
    return Hessian(graph, loss_target(graph), find_sites(graph), batches)


def test_products_are_those_with_the_exact_hessian(
    attending: tuple[Attending, Graph, Tensor], hessian: Hessian
):
    model, _, ids = attending
    exact, places = exact_hessian(model, ids)
    assert set(hessian.weights) == set(places)
    torch.manual_seed(1)
    vectors = {name: torch.randn_like(weight) for name, weight in hessian.weights.items()}
    together = exact @ torch.cat([vectors[name].flatten() for name in places])
    got = hessian.product(vectors)
    for name, place in places.items():
        # Both are float64; only the order of sums differs.
        expected = together[place].reshape(got[name].shape)
        torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-12)


def test_power_iteration_finds_the_largest_eigenvalue(
    attending: tuple[Attending, Graph, Tensor], hessian: Hessian
):
    model, _, ids = attending
    found = largest_eigenvalues(hessian, rounds=300, tolerance=1e-9, seed=0)
    exact, places = exact_hessian(model, ids)
    for name, place in places.items():
        largest = float(torch.linalg.eigvalsh(exact[place, place])[-1])
        # The tolerance is of the last step; close eigenvalues are told apart slowly.
        assert found[name] == pytest.approx(largest, rel=1e-4)


def test_probes_of_signs_find_the_trace(
    attending: tuple[Attending, Graph, Tensor], hessian: Hessian
):
    model, _, ids = attending
    probes = 300
    found = traces(hessian, probes, seed=0)
    exact, places = exact_hessian(model, ids)
    for name, place in places.items():
        block = exact[place, place]
        beside = block - block.diag().diag()
        # The variance of a probe, from the definition: pairs within the block count twice.
        others = exact[place].square().sum() - block.square().sum()
        deviation = ((2 * beside.square().sum() + others) / probes).sqrt()
        assert abs(found[name] - float(block.trace())) < 4 * float(deviation)


def test_hawq_is_half_the_mean_curvature_times_the_squared_error(
    attending: tuple[Attending, Graph, Tensor],
):
    _, graph, ids = attending
    analyses = Analyses(graph, Samples.of([{"ids": ids}]))
    f = Format(2)
    report = analyses.get(Hawq((f,), int8_activations=False, sequences=3, probes=3))
    assert report.unit == "KL per token"
    hessian = Hessian(graph, loss_target(graph), find_sites(graph), [{"ids": ids}])
    trace = traces(hessian, 3, 0)
    largest = largest_eigenvalues(hessian, 20, 0.01, 0)
    by_value = analyses.get(HawqEigenvalue((f,), sequences=3)).losses
    for site in find_sites(graph):
        weight = graph.weight(site.node).float()
        error = float((dequantized(weight, f) - weight).double().square().sum()) / weight.numel()
        expected = trace[site.weight] / 2 * error
        assert report.losses[site.weight][f] == pytest.approx(expected, rel=1e-6)
        assert by_value[site.weight][f] == pytest.approx(largest[site.weight] * error, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_hawq_predicts_within_a_factor_what_is_measured(
    family: str, captured: Captured, sample_inputs: Callable[..., dict[str, Tensor]]
):
    samples = Samples.of([sample_inputs(family, 8, 16, seed) for seed in range(2)])
    analyses = Analyses(captured(family), samples)
    f = Format(4)
    measured = analyses.get(bit_score("kl", (f,))).losses
    predicted = analyses.get(Hawq((f,), sequences=16)).losses
    ratios = [predicted[n][f] / m[f] for n, m in measured.items() if m[f] > 1e-10]
    # Random weights have no outliers: errors are nearly isotropic.
    assert 0.5 < float(torch.tensor(ratios).median()) < 2.0


# ---- the two taps --------------------------------------------------------------------------


def test_fisher_gram_is_the_elementwise_form_where_there_is_one_token():
    """With one token, ``1/2 sum_n g_n^2 (D x)_n^2`` needs no independence of any kind."""
    torch.manual_seed(0)

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(40, 24), nn.Linear(24, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.second(torch.tanh(self.first(x)))}

    model = Stacked()
    x = torch.randn(1, 40)
    graph = capture_module(model, {"x": torch.randn(2, 40)})
    analyses = Analyses(graph, Samples.of([{"x": x}]))
    f = Format(4)
    for int8 in (False, True):
        report = analyses.get(FisherGram((f,), int8, sequences=1, draws=1))
        hidden = torch.tanh(model.first(x))
        logits = model.second(hidden)
        loss = drawn_loss(logits, loss_target(graph), next(sequence_generators(0)))
        g_hidden, g_logits = torch.autograd.grad(loss, [hidden, logits])
        g_first = (g_hidden * (1 - hidden.square())).detach()
        for layer, read, gradient in (("first", x, g_first), ("second", hidden, g_logits)):
            weight = getattr(model, layer).weight.detach()
            change = read.detach() @ (dequantized(weight, f) - weight).T
            expected = 0.5 * float((gradient * change).double().square().sum())
            if int8:
                steps = functional.pad(read.detach(), (0, -read.shape[1] % 32)).reshape(-1, 32)
                variance = ((steps.abs().amax(1) / 127) ** 2 / 12).repeat_interleave(32)
                at_input = (gradient @ weight).square()[0] * variance[: read.shape[1]]
                expected += 0.5 * float(at_input.sum())
            # Float32 sums of some hundred terms.
            assert report.losses[f"{layer}.weight"][f] == pytest.approx(expected, rel=1e-4)


def test_rounding_of_inputs_in_fisher_is_the_sum_of_squares_over_entries():
    torch.manual_seed(0)
    layer = nn.Linear(70, 5, bias=False)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = layer

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(x)}

    x = torch.randn(200, 70) * torch.linspace(0.1, 4, 70)
    analyses = Analyses(capture_module(Head(), {"x": x[:2]}), Samples.of([{"x": x}]))
    f = Format(8, block=32)
    with_it, without = (
        analyses.get(Fisher((f,), int8, sequences=200, draws=10)).losses["head.weight"][f]
        for int8 in (True, False)
    )
    with torch.no_grad():
        p = layer(x).double().softmax(1)
        change = (round_to_int8(x, 32) - x).double()
        # The Fisher matrix of the logits as seen from each entry of the input.
        w = layer.weight.double()
        seen = torch.einsum("tn,nk->tk", p, w.square()) - (p @ w).square()
        expected = 0.5 * float((seen * change.square()).sum(1).mean())
    # 2,000 draws of a few classes.
    assert with_it - without == pytest.approx(expected, rel=0.05)


def test_taps_do_not_depend_on_batches(
    captured: Captured, sample_inputs: Callable[..., dict[str, Tensor]]
):
    graph = captured("llama")
    batch = sample_inputs("llama", 6, 8, 0)
    parts = [{name: value[cut] for name, value in batch.items()} for cut in _CUTS]
    asked = OutputGradients(sequences=6, draws=2)
    together = Analyses(graph, Samples.of([batch])).get(asked)
    apart = Analyses(graph, Samples.of(parts)).get(asked)
    for one, other in ((together.outputs, apart.outputs), (together.inputs, apart.inputs)):
        assert list(one) == list(other)
        for name, value in one.items():
            # Products of float32 matrices of other heights round differently.
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=0.0)
    for name, value in together.counts.items():
        assert float(value.sum()) == pytest.approx(1.0, abs=0.02)
        torch.testing.assert_close(apart.counts[name], value)


_CUTS = (slice(0, 1), slice(1, 4), slice(4, 6))


def test_fisher_and_fisher_gram_share_a_run(
    captured: Captured,
    sample_inputs: Callable[..., dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
):
    samples = Samples.of([sample_inputs("llama", 4, 8, 0)])
    analyses = Analyses(captured("llama"), samples)
    formats = (Format(4), Format(8))
    analyses.get(bit_score("fisher", formats))
    alone = Analyses(captured("llama"), samples).get(bit_score("fisher-gram", formats))
    monkeypatch.setattr(OutputGradients, "run", _never)
    assert analyses.get(bit_score("fisher-gram", formats)) == alone


def _never(*_: object) -> None:
    raise AssertionError("the gradients are known")


def test_signs_have_the_fisher_matrix_as_second_moment():
    torch.manual_seed(0)
    rows = (3 * torch.randn(1, 4)).requires_grad_()
    graph = capture_module(_Logits(), {"x": torch.randn(2, 4)})
    generator = torch.Generator().manual_seed(0)
    moment = torch.zeros(4, 4, dtype=torch.float64)
    for _ in range(4000):
        loss = drawn_loss(rows, loss_target(graph), generator)
        gradient = torch.autograd.grad(loss, rows)[0].double()[0]
        moment += torch.outer(gradient, gradient) / 4000
    p = rows.detach().double().softmax(-1)[0]
    # 4,000 draws of entries of at most a quarter.
    torch.testing.assert_close(moment, torch.diag(p) - torch.outer(p, p), rtol=0.0, atol=0.01)


class _Logits(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x * 1.0}
