"""Scores: definitions, directions, and what they predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from lamella.data import Samples
from lamella.errors import RecipeError, SamplesError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.operators import round_to_int8
from lamella.ir.quantize import Format, dequantized
from lamella.passes.base import Analyses
from lamella.passes.scores import BIT_SCORES, SCORES, ScoreReport, bit_score, score
from lamella.passes.scores.base import finite
from lamella.passes.scores.fisher import Fisher
from lamella.passes.scores.kl import MeasuredKl
from lamella.passes.scores.target import first_sequences, loss_target
from lamella.passes.sites import find_sites

Captured = Callable[[str], Graph]

FORMATS = (Format(2), Format(4), Format(8), Format(32))


@pytest.fixture
def samples(sample_inputs: Callable[..., dict[str, Tensor]]) -> Samples:
    return Samples.of([sample_inputs("llama", 8, 16, seed) for seed in range(4)])


@pytest.fixture
def llama(captured: Captured, samples: Samples) -> Analyses:
    return Analyses(captured("llama"), samples)


# ---- blocks and branches ----------------------------------------------------------------


@pytest.mark.parametrize("by", SCORES)
@pytest.mark.parametrize("level", ["block", "sublayer"])
def test_every_score_has_a_value_for_every_part(by: str, level: str, llama: Analyses):
    graph = llama.graph
    report = llama.get(score(by, level))  # type: ignore[arg-type]
    parts = graph.blocks if level == "block" else graph.stream.sublayers
    assert list(report.values) == [part.name for part in parts]
    assert set(report.order()) == set(report.values)
    assert report.unit


def test_the_order_follows_the_direction():
    values = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.0}
    important = ScoreReport("x", "block", values, "none", "important")
    dispensable = ScoreReport("x", "block", values, "none", "dispensable")
    assert important.order() == ("b", "d", "c", "a")
    assert dispensable.order() == ("a", "c", "b", "d")
    assert dispensable.importance() == {"a": -3.0, "b": -1.0, "c": -2.0, "d": -1.0}


def test_lim_and_similarity_give_blocks_the_same_order(llama: Analyses):
    lim, similarity = llama.get(score("lim")), llama.get(score("similarity"))
    assert lim.order() == similarity.order()
    for name, value in lim.values.items():
        assert similarity.values[name] == pytest.approx(1 + value, abs=1e-12)


def test_size_is_the_bytes_of_the_weights(llama: Analyses):
    values = llama.get(score("size")).values
    width, inner, heads_of_keys = 32, 64, 16
    weights = 2 * width * width + 2 * heads_of_keys * width + 3 * width * inner + 2 * width
    assert set(values.values()) == {4.0 * weights}


def test_random_depends_on_the_seed_alone(llama: Analyses):
    first = llama.get(score("random", seed=1)).values
    assert first == Analyses(llama.graph).get(score("random", seed=1)).values
    assert first != llama.get(score("random", seed=2)).values


def test_unknown_scores_name_the_closest():
    with pytest.raises(RecipeError, match="called 'simlarity'; did you mean 'similarity'"):
        score("simlarity")
    with pytest.raises(RecipeError, match=r"of weights called 'fischer'; did you mean 'fisher'"):
        bit_score("fischer", FORMATS)


def test_scores_that_need_data_say_so(captured: Captured):
    with pytest.raises(SamplesError, match="needs data"):
        Analyses(captured("llama")).get(bit_score("fisher", FORMATS))


# ---- weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("by", BIT_SCORES)
def test_every_bit_score_has_a_loss_for_every_weight_and_format(by: str, llama: Analyses):
    report = llama.get(bit_score(by, FORMATS))
    assert list(report.losses) == [site.weight for site in find_sites(llama.graph)]
    for losses in report.losses.values():
        assert list(losses) == list(FORMATS)
        assert losses[Format(32)] == 0.0
        assert losses[Format(2)] > losses[Format(4)] > losses[Format(8)] > 0.0
    assert report.higher_means == "sensitive"
    assert report.measured == (by == "kl")


def test_weight_error_is_the_relative_squared_error(llama: Analyses):
    report = llama.get(bit_score("weight-error", FORMATS))
    for site in find_sites(llama.graph)[:3]:
        weight = llama.graph.weight(site.node).double()
        rounded = dequantized(weight.float(), Format(4)).double()
        expected = (rounded - weight).square().sum() / weight.square().sum()
        # The difference of two float32 weights.
        assert report.losses[site.weight][Format(4)] == pytest.approx(float(expected), rel=1e-5)


def test_output_error_is_the_relative_error_of_the_outputs():
    torch.manual_seed(0)
    layer = nn.Linear(70, 9, bias=False)
    graph = capture_module(layer, {"input": torch.randn(2, 3, 70)})
    x = torch.randn(40, 5, 70) * torch.linspace(0.1, 3, 70)
    analyses = Analyses(graph, Samples.of([{"input": x[:15]}, {"input": x[15:]}]))
    f = Format(4, block=32)
    for int8 in (False, True):
        made = type(bit_score("output-error", (f,)))
        report = analyses.get(made((f,), int8))  # type: ignore[call-arg]
        rounded = dequantized(layer.weight.detach(), f)
        inputs = round_to_int8(x, f.block) if int8 else x
        with torch.no_grad():
            error = functional.linear(inputs, rounded) - layer(x)
            expected = float(error.double().square().sum() / layer(x).double().square().sum())
        # The variance of rounding is that of a uniform error; 14,000 of them are drawn here.
        assert report.losses["weight"][f] == pytest.approx(expected, rel=0.02 if int8 else 1e-4)


def test_measured_kl_is_that_of_the_model_with_one_weight_rounded(
    llama: Analyses, samples: Samples
):
    graph = llama.graph
    f = Format(2)
    report = llama.get(MeasuredKl((f,), int8_activations=False, sequences=16))
    assert report.unit == "KL per token"
    batches = list(samples)[:2]
    for site in find_sites(graph)[::5]:
        changed = graph.copy()
        node = changed.weight_node(site.weight)
        changed.set_weight(node, dequantized(graph.weight(site.node), f))
        total, tokens = 0.0, 0
        for batch in batches:
            p = graph(**batch).logits.double().log_softmax(-1)
            q = changed(**batch).logits.double().log_softmax(-1)
            kept = batch["attention_mask"].bool()
            total += float((p.exp() * (p - q)).sum(-1)[kept].sum())
            tokens += int(kept.sum())
        # Logits are float32: a few units of 1e-7 per log-probability.
        assert report.losses[site.weight][f] == pytest.approx(total / tokens, rel=1e-3, abs=1e-6)


def test_the_rounding_of_activations_is_measured_too(llama: Analyses):
    f = Format(8)
    without = llama.get(MeasuredKl((f,), int8_activations=False)).losses
    with_it = llama.get(MeasuredKl((f,), int8_activations=True)).losses
    linears = [site.weight for site in find_sites(llama.graph) if site.role != "embedding"]
    assert sum(with_it[name][f] for name in linears) > 1.1 * sum(without[n][f] for n in linears)


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_fisher_predicts_what_is_measured(
    family: str, captured: Captured, sample_inputs: Callable[..., dict[str, Tensor]]
):
    samples = Samples.of([sample_inputs(family, 8, 16, seed) for seed in range(4)])
    analyses = Analyses(captured(family), samples)
    formats = (Format(2), Format(4), Format(8))
    measured = analyses.get(MeasuredKl(formats, sequences=32))
    predicted = analyses.get(Fisher(formats))
    assert predicted.unit == measured.unit
    for f in formats:
        names = [name for name, losses in measured.losses.items() if losses[f] > 1e-10]
        a = torch.tensor([predicted.losses[name][f] for name in names])
        b = torch.tensor([measured.losses[name][f] for name in names])
        # 32 sequences with 4 draws each: single values are known to some 15 %, and at 2
        # bits the loss is no longer a quadratic form.
        assert spearmanr(a, b).statistic > 0.94
        assert 0.8 < float((a / b).median()) < 1.25


def test_fisher_of_a_single_layer_is_the_exact_quadratic_form():
    """For a head alone: ``1/2 (D x)^T (diag(p) - p p^T) (D x)``, by the definition."""
    torch.manual_seed(0)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 5, bias=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(x)}

    model = Head()
    graph = capture_module(model, {"x": torch.randn(2, 64)})
    x = torch.randn(300, 64)
    analyses = Analyses(graph, Samples.of([{"x": x}]))
    f = Format(2)
    report = analyses.get(Fisher((f,), int8_activations=False, sequences=300, draws=40))
    weight = model.head.weight.detach()
    with torch.no_grad():
        p = model(x)["logits"].double().softmax(1)
        change = x.double() @ (dequantized(weight, f) - weight).double().T
        expected = 0.5 * ((p * change.square()).sum(1) - (p * change).sum(1).square()).mean()
    # 12,000 labels are drawn; the squares that are averaged spread about as wide as their mean.
    assert report.losses["head.weight"][f] == pytest.approx(float(expected), rel=0.05)


def test_a_weight_with_two_readers_adds_their_changes_before_squaring():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            # The second reader undoes the first: no error of the weight reaches the output.
            return {"logits": self.layer(x) - self.layer(x * 1.0) + x}

    graph = capture_module(Twice(), {"x": torch.randn(2, 32)})
    samples = Samples.of([{"x": torch.randn(4, 32)}])
    fisher = Fisher((Format(2),), int8_activations=False)
    losses = Analyses(graph, samples).get(fisher).losses
    assert losses["layer.weight"][Format(2)] == pytest.approx(0.0, abs=1e-12)


def test_errors_that_do_not_fit_into_memory_take_more_runs(
    llama: Analyses, monkeypatch: pytest.MonkeyPatch
):
    by = Fisher((Format(4),), sequences=8)
    together = llama.get(by).losses
    monkeypatch.setattr("lamella.passes.scores.fisher._ERROR_BYTES", 20_000)
    apart = Analyses(llama.graph, llama.samples).get(by).losses
    assert list(apart) == list(together)
    for name, losses in together.items():
        # The same labels are drawn; only the order of sums in float32 differs.
        assert apart[name][Format(4)] == pytest.approx(losses[Format(4)], rel=1e-5)


def test_results_repeat(llama: Analyses, samples: Samples):
    again = Analyses(llama.graph, samples)
    for by in ("fisher", "kl"):
        assert llama.get(bit_score(by, FORMATS)) == again.get(bit_score(by, FORMATS))


def test_the_target_is_the_logits_and_padding_counts_nowhere(captured: Captured, samples: Samples):
    graph = captured("llama")
    target = loss_target(graph)
    assert target.kind == "logits"
    assert target.mask is not None
    assert loss_target(captured("bert")).kind == "embedding"
    batches = [dict(batch) for batch in samples.take(1)]
    batches[0]["attention_mask"] = batches[0]["attention_mask"].clone()
    batches[0]["attention_mask"][:, 10:] = 0
    # What stands in the padding changes nothing.
    other = [dict(batch) for batch in batches]
    other[0]["input_ids"] = other[0]["input_ids"].clone()
    other[0]["input_ids"][:, 10:] = 5
    by = bit_score("kl", (Format(4),))
    first, second = (Analyses(graph, Samples.of(b)).get(by).losses for b in (batches, other))
    for name, losses in first.items():
        assert losses[Format(4)] == pytest.approx(second[name][Format(4)], rel=1e-4, abs=1e-8)


def test_only_as_many_batches_run_as_are_asked_for(samples: Samples):
    assert len(first_sequences(samples, 9)) == 2
    assert len(first_sequences(samples, 8)) == 1
    assert len(first_sequences(samples, 1000)) == 4


def test_a_score_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="score of w is nan"):
        finite(float("nan"), "w")


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("by", ["fisher", "fisher-gram", "relevance"])
def test_scores_differentiate_where_the_caller_does_not(
    by: str, off: Any, captured: Callable[[str], Graph], sample_inputs: Callable[..., Any]
) -> None:
    graph, samples = captured("llama"), Samples.of([sample_inputs("llama")])
    expected = Analyses(graph, samples).get(bit_score(by, [Format(4)])).losses
    with off():
        found = Analyses(graph, samples).get(bit_score(by, [Format(4)])).losses
    # The same operations in the same order.
    assert found == expected
