"""Heads, experts, channels and weights: beside the model without them, and beside autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lamella.data import Samples
from lamella.errors import GraphError, SamplesError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.passes.analyses.relevance import Relevance
from lamella.passes.analyses.relevance_report import RelevanceReport
from lamella.passes.base import Analyses
from lamella.passes.parts import find_parts
from lamella.passes.scores.relevance import RelevanceScore
from lamella.passes.scores.relevance_of_parts import PartScoreReport, RelevanceOfParts
from lamella.passes.scores.relevance_of_rounding import RelevanceOfRounding
from lamella.rewrite.canonicalize import canonicalize
from lamella.rules.relevance.presets import preset_of

Captured = Callable[[str], Graph]
Made = Callable[[str], nn.Module]
SampleInputs = Callable[..., dict[str, Tensor]]

ALL = ("block", "sublayer", "head", "head-group", "expert", "channel")
PARTS = ("heads", "experts", "channels", "weights")


def scores(graph: Graph, batches: list[dict[str, Tensor]], **options: Any) -> PartScoreReport:
    return Analyses(graph, Samples.of(batches)).get(RelevanceOfParts(**options))


def relevance(graph: Graph, batches: list[dict[str, Tensor]], **options: Any) -> RelevanceReport:
    return Analyses(graph, Samples.of(batches)).get(Relevance(**options))


def singles(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    rows = range(len(next(iter(batch.values()))))
    return [{name: value[row : row + 1] for name, value in batch.items()} for row in rows]


# ---- the model without a part -------------------------------------------------------------


class Arms(nn.Module):
    """Attention (four heads, two of keys) and an MLP side by side, and a head without a norm.

    All is linear behind the parts, so that leaving one out changes the output by its first-order
    effect and nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
            self.o = nn.Linear(16, 16, bias=False)
            self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
            self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, heads: Tensor | None = None, channels: Tensor | None = None):
        """`heads` ``[tokens, 4, 4]`` and `channels` ``[tokens, 24]`` are taken away."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
        mixed = mixed if heads is None else mixed - heads
        hidden = functional.gelu(self.up(x))
        hidden = hidden if channels is None else hidden - channels
        attended = self.o(mixed.flatten(2))
        return {"logits": self.head(x + attended + self.down(hidden))}

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
            for layer in (self.o, self.down)
        ]
        self(x)
        for hook in hooks:
            hook.remove()
        return kept[0].unflatten(-1, (4, 4)), kept[1]


X = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def arms() -> tuple[Arms, Graph]:
    model = Arms().eval()
    graph = capture_module(model, {"x": X})
    canonicalize(graph)
    return model, graph


@pytest.mark.parametrize("baseline", ["zero", "mean"])
@torch.no_grad()
def test_a_score_is_what_the_output_loses_without_the_part(baseline: str, arms: tuple[Arms, Graph]):
    model, graph = arms
    found = scores(
        graph,
        [{"x": X}],
        kinds=("head", "head-group", "channel"),
        preset="gradient",
        start="logit:2",
        baseline=baseline,
    )
    heads, channels = model.parts(X)
    if baseline == "mean":
        heads, channels = heads - heads.mean((0, 1)), channels - channels.mean((0, 1))

    def lost(**without: Tensor) -> list[float]:
        change = model(X)["logits"] - model(X, **without)["logits"]
        return change[..., 2].sum(1).tolist()

    for kind, count in (("head", 4), ("head-group", 2)):
        (values,), (flows,) = found.of(kind).values.values(), found.of(kind).flows.values()
        assert len(values) == count
        for place in range(count):
            whose = torch.zeros(4, 1)
            whose[place * 4 // count : (place + 1) * 4 // count] = 1
            effects = lost(heads=heads * whose)
            # Differences of float32 outputs.
            assert values[place] == pytest.approx(sum(map(abs, effects)) / 3, rel=1e-3, abs=1e-5)
            assert flows[place] == pytest.approx(sum(effects) / 3, rel=1e-3, abs=1e-5)
    (values,) = found.of("channel").values.values()
    for place in (0, 7, 23):
        effects = lost(channels=channels * functional.one_hot(torch.tensor(place), 24))
        assert values[place] == pytest.approx(sum(map(abs, effects)) / 3, rel=1e-3, abs=1e-5)
    name, place = found.of("channel").order()[0]
    assert found.of("channel").values[name][place] == min(values)
    assert found.of("head").higher_means == "important"


@torch.no_grad()
def test_rounding_has_the_effect_that_it_has_where_all_is_linear(arms: tuple[Arms, Graph]):
    model, graph = arms
    asked = RelevanceOfRounding((2, 5), start="logit:2")
    found = Analyses(graph, Samples.of([{"x": X}])).get(asked)
    _, channels = model.parts(X)
    (gelu,) = (name for name in found.effects if name.startswith("gelu"))
    for place, levels in enumerate((1, 15)):
        step = channels.abs().amax(-1, keepdim=True) / levels
        error = (channels / step).round() * step - channels
        changed = model(X, channels=-error)["logits"] - model(X)["logits"]
        effects = changed[..., 2].sum(1).double()
        want = float(effects.square().mean().sqrt())
        # Differences of float32 outputs.
        assert found.effects[gelu][place] == pytest.approx(want, rel=1e-3)
        gradient = model.head.weight[2] @ model.down.weight
        parts = (error * gradient).double().square().sum((1, 2))
        assert found.spreads[gelu][place] == pytest.approx(float(parts.mean().sqrt()), rel=1e-3)
    assert found.higher_means == "sensitive"
    least = found.order(2)[0]
    assert found.effects[least][0] == min(effects[0] for effects in found.effects.values())
    with pytest.raises(ValueError, match="3 bits were not scored"):
        found.order(3)
    with pytest.raises(ValueError, match=r"bits must be widths of 2 to 16, got \(1,\)"):
        RelevanceOfRounding((1,))


# ---- the gradient of a model of transformers ----------------------------------------------


def factors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of the last layers of branches times factors of 1, and the factors."""
    changed: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name.endswith("o_proj.weight"):
            factors[name] = torch.ones(4, requires_grad=True)
            changed[name] = (weight.unflatten(1, (4, -1)) * factors[name].unsqueeze(-1)).flatten(1)
        elif name.endswith("mlp.down_proj.weight"):
            factors[name] = torch.ones(weight.shape[1], requires_grad=True)
            changed[name] = weight * factors[name]
        elif name.endswith("experts.down_proj"):
            count, _, width = weight.shape
            factors[name] = torch.ones(count, 1, 1, requires_grad=True)
            factors[f"{name} channels"] = torch.ones(count, 1, width, requires_grad=True)
            changed[name] = weight * factors[name] * factors[f"{name} channels"]
    return changed, factors


def effects_by_autograd(model: nn.Module, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """``<b, gradient>`` of every part: the derivative by a factor on what it adds."""
    changed, factors = factors_of(model)
    with torch.enable_grad():
        logits = functional_call(model, changed, (), row).logits
        top = logits.amax(-1).sum()
        found = torch.autograd.grad(top, list(factors.values()))
    return dict(zip(factors, (one.double() for one in found), strict=True))


def close(got: Any, want: Tensor) -> None:
    # Sums of float32 products of both signs, relative to the largest part.
    values = torch.as_tensor(got, dtype=torch.float64).flatten()
    largest = float(want.abs().max())
    torch.testing.assert_close(values, want.flatten(), rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_parts_have_the_effects_that_autograd_finds(
    family: str, model: Made, captured: Captured, sample_inputs: SampleInputs
):
    graph, batch = captured(family), sample_inputs(family, 3, 7)
    batch = {name: value for name, value in batch.items() if name == "input_ids"}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    rows = [effects_by_autograd(model(family), row) for row in singles(batch)]
    found = scores(graph, [batch], kinds=ALL, preset="gradient", start="logit")
    told = relevance(graph, [batch], preset="gradient", taps=PARTS)
    for layer in range(3):
        stem = f"model.layers.{layer}"
        effects = torch.stack([row[f"{stem}.self_attn.o_proj.weight"] for row in rows])
        close(found.of("head").values[f"{stem}.attention"], effects.abs().mean(0))
        close(found.of("head").flows[f"{stem}.attention"], effects.mean(0))
        groups = effects.unflatten(1, (2, 2)).sum(-1)
        close(found.of("head-group").values[f"{stem}.attention"], groups.abs().mean(0))
        heads = told.heads[layer]
        close([head.flow for head in heads.heads], effects.mean(0))
        close([group.flow for group in heads.groups], groups.mean(0))
        if family == "llama":
            effects = torch.stack([row[f"{stem}.mlp.down_proj.weight"] for row in rows])
            close(found.of("channel").values[f"{stem}.mlp"], effects.abs().mean(0))
            close(told.channels[layer].flow, effects.mean(0))
            continue
        effects = torch.stack([row[f"{stem}.mlp.experts.down_proj"].flatten() for row in rows])
        close(found.of("expert").values[f"{stem}.moe"], effects.abs().mean(0))
        close(told.experts[layer].flow, effects.mean(0))
        of_channels = [row[f"{stem}.mlp.experts.down_proj channels"].squeeze(1) for row in rows]
        effects = torch.stack(of_channels)
        close(told.channels[layer].flow, effects.mean(0))
        for expert in range(effects.shape[1]):
            values = found.of("channel").values[f"{stem}.moe.expert.{expert}"]
            close(values, effects[:, expert].abs().mean(0))


def test_branches_have_the_scores_of_the_score_of_branches(
    captured: Captured, sample_inputs: SampleInputs
):
    graph, batch = captured("llama"), sample_inputs("llama", 2)
    analyses = Analyses(graph, Samples.of([batch]))
    found = analyses.get(RelevanceOfParts(("sublayer", "block"), baseline="mean"))
    for kind in ("sublayer", "block"):
        one_by_one = analyses.get(RelevanceScore(kind)).values
        assert {name: value for name, (value,) in found.of(kind).values.items()} == one_by_one


# ---- weights, tokens and pixels -----------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", "resnet"])
def test_rows_of_weights_have_their_products_with_gradients(
    family: str, model: Made, captured: Captured, sample_inputs: SampleInputs
):
    batch = sample_inputs(family, 2)
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    network = model(family)
    network(**batch).logits.amax(-1).sum().backward()
    told = relevance(captured(family), [batch], preset="gradient", taps=("weights",))
    parameters = dict(network.named_parameters())
    assert len(told.weights) > 5
    for weight in told.weights:
        parameter = parameters[weight.weight]
        assert parameter.grad is not None
        products = (parameter.detach() * parameter.grad).double()
        rows = products.sum(-1) if products.ndim < 4 else products.sum((1, 2, 3))
        close(weight.rows.flatten(), rows.flatten() / 2)
        assert weight.amounts.flow == pytest.approx(float(weight.rows.sum()))


def test_weights_and_biases_make_up_a_layer_where_norms_are_folded(
    captured: Captured, sample_inputs: SampleInputs
):
    """Where a batch norm is part of its convolution, so is its bias."""
    graph, batch = captured("resnet"), sample_inputs("resnet", 2)
    preset = dataclasses.replace(preset_of("cp"), name="cp, folded", fold_batch_norms=True)
    told = relevance(graph, [batch], preset=preset, taps=("weights", "operations"), ledger=True)
    flows = {op.node: op.amounts.flow for op in told.operations}
    norms = [node for node in graph.nodes if "batch_norm" in str(node.target)]
    rows = {weight.weight: weight.amounts.flow for weight in told.weights}
    bias = 0.0
    for norm in norms:
        layer = graph.operand(norm, "input")
        bias += flows[norm.name] - rows[str(graph.operand(layer, "weight").target)]
    head = [op for op in told.operations if "linear" in op.operator][-1]
    bias += head.amounts.flow - rows["classifier.1.weight"]
    # The ledger finds the same in other places of the sweep; float32 on the way.
    assert bias == pytest.approx(told.ledger["bias"], rel=1e-3)


def test_tokens_and_pixels_are_those_of_the_inputs(captured: Captured, sample_inputs: SampleInputs):
    batch = sample_inputs("llama", 3, 7)
    told = relevance(captured("llama"), [batch], taps=("tokens",))
    assert list(told.tokens) == ["input_ids"]
    rows = told.tokens["input_ids"]
    assert [len(row) for row in rows] == [7, 7, 7]
    flow = sum(map(sum, rows)) / 3
    # float64 sums of the same numbers in another order.
    assert flow == pytest.approx(told.inputs["input_ids"].flow, rel=1e-9)
    batch = sample_inputs("vit", 3)
    told = relevance(captured("vit"), [batch], taps=("pixels",))
    flows, masses = told.pixels["pixel_values"]
    assert flows.shape == batch["pixel_values"].shape[2:]
    assert float(flows.sum()) == pytest.approx(told.inputs["pixel_values"].flow, rel=1e-9)
    assert bool((masses >= flows.abs() - 1e-12).all())
    with pytest.raises(GraphError, match=r"no input holds pixels .* input_ids \(torch.int64"):
        relevance(captured("llama"), [sample_inputs("llama")], taps=("pixels",))
    with pytest.raises(GraphError, match=r"no input holds tokens .* pixel_values \(torch.float32"):
        relevance(captured("vit"), [batch], taps=("tokens",))


# ---- samples and options ------------------------------------------------------------------


def numbers(report: RelevanceReport | PartScoreReport) -> Tensor:
    if isinstance(report, PartScoreReport):
        every = [v for one in report.kinds.values() for v in one.values.values()]
        return torch.cat([torch.tensor(values, dtype=torch.float64) for values in every])
    found = [each.flow for each in (*report.experts, *report.channels)]
    found += [each.mass for each in (*report.experts, *report.channels)]
    found += [each.rows for each in report.weights]
    heads = [head for each in report.heads for head in each.heads]
    found.append(torch.tensor([(head.flow, head.mass) for head in heads]))
    found += [torch.tensor(row) for row in report.tokens.get("input_ids", ())]
    return torch.cat([one.double().flatten() for one in found])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_how_samples_are_cut_and_padded_makes_no_difference(
    family: str, captured: Captured, sample_inputs: SampleInputs
):
    graph, batch = captured(family), sample_inputs(family, 3, 6)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    # A padded token starts nothing; to an expert it would be sent all the same.
    padded = {
        "input_ids": functional.pad(batch["input_ids"], (0, 2), value=5),
        "attention_mask": functional.pad(batch["attention_mask"], (0, 2)),
    }
    cuts = ([batch], singles(batch), [{n: v[:2] for n, v in batch.items()}, singles(batch)[2]])
    asked: tuple[tuple[Any, dict[str, Any]], ...] = (
        (relevance, {"taps": (*PARTS, "tokens")}),
        (scores, {"kinds": ALL, "start": "logit", "baseline": "mean"}),
    )
    for ask, options in asked:
        whole, *others = (numbers(ask(graph, cut, **options)) for cut in cuts)
        for other in others:
            # Other kernels for other shapes, in float32; relative to the largest.
            torch.testing.assert_close(other, whole, rtol=1e-3, atol=1e-5 * float(whole.max()))
    whole, longer = (
        numbers(scores(graph, [some], kinds=ALL, start="logit", baseline="mean"))
        for some in (batch, padded)
    )
    torch.testing.assert_close(longer, whole, rtol=2e-3, atol=1e-5 * float(whole.max()))


def test_every_kind_is_found_in_the_families_that_have_it(captured: Captured):
    wanted = {
        "llama": {"head", "head-group", "channel"},
        "mixtral": {"head", "head-group", "channel", "expert"},
        "mamba": {"channel"},
        "resnet": {"channel"},
    }
    for family, kinds in wanted.items():
        parts = find_parts(captured(family))
        assert {one.kind for one in parts} == kinds
        names = [(one.kind, one.name) for one in parts]
        assert len(set(names)) == len(names)


def test_options_are_checked(captured: Captured, arms: tuple[Arms, Graph]):
    with pytest.raises(ValueError, match="unknown kind 'heads'; did you mean 'head'"):
        RelevanceOfParts(("heads",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 1"):
        RelevanceOfParts(sequences=0)
    with pytest.raises(ValueError, match="baseline must be zero or mean"):
        RelevanceOfParts(baseline="none")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="the model has no expert; kinds are block"):
        scores(arms[1], [{"x": X}], kinds=("expert",))
    report = scores(arms[1], [{"x": X[:1]}], kinds=("head",))
    with pytest.raises(ValueError, match="no scores of 'channel'; known are head"):
        report.of("channel")
    with pytest.raises(SamplesError, match="needs data"):
        Analyses(captured("llama")).get(RelevanceOfParts())
    turned = dataclasses.replace(report.of("head"), higher_means="dispensable")
    assert turned.order() == tuple(reversed(report.of("head").order()))
