"""Relevance as a score, beside autograd and the published definitions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from lamella.data import Samples
from lamella.errors import SamplesError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.operators import round_to_int8
from lamella.ir.ops import aten
from lamella.ir.quantize import Format, dequantized
from lamella.ir.verify import verify
from lamella.passes.base import Analyses, Analysis, Transform
from lamella.passes.scores.fisher import Fisher
from lamella.passes.scores.lrp_qvit import LrpQvit, layer_shares
from lamella.passes.scores.relevance import RelevanceScore
from lamella.passes.scores.relevance_bits import RelevanceBits
from lamella.passes.sites import find_sites
from lamella.passes.transforms.allocate_bits import AllocateBits
from lamella.passes.transforms.drop_blocks import DropBlocks
from lamella.passes.transforms.drop_sublayers import DropSublayers
from lamella.rewrite.canonicalize import canonicalize

Captured = Callable[[str], Graph]
SampleInputs = Callable[..., dict[str, Tensor]]

FORMATS = (Format(2), Format(4), Format(8), Format(32))


@pytest.fixture
def samples(sample_inputs: SampleInputs) -> list[dict[str, Tensor]]:
    """Batches of tokens none of which is hidden."""
    tokens = [sample_inputs("llama", 3, 12, seed)["input_ids"] for seed in range(2)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in tokens]


class _Recorded(fx.Interpreter):
    """Runs a graph with a leaf for each weight, and keeps all values for their gradients."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.module, garbage_collect_values=False)
        self._nodes = graph.nodes
        self.leaves: dict[str, Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if value.is_floating_point():
            value = self.leaves.setdefault(str(target), value.detach().clone().requires_grad_())
        return value

    def logits(self, sample: Mapping[str, Tensor], name: str) -> Tensor:
        given = [sample[str(n.target)] for n in self._nodes if n.op == "placeholder"]
        with torch.enable_grad():
            self.run(*given)
        return self.named(name)

    def named(self, name: str) -> Tensor:
        return next(value for node, value in self.env.items() if node.name == name)


def _rows(samples: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        {name: value[row : row + 1] for name, value in sample.items()}
        for sample in samples
        for row in range(len(next(iter(sample.values()))))
    ]


def _top(logits: Tensor) -> Tensor:
    return logits.amax(-1).sum()


# ---- blocks and branches ------------------------------------------------------------------


@pytest.mark.parametrize("level", ["block", "sublayer"])
@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_the_score_of_a_part_is_its_effect_by_autograd(
    level: Any, baseline: Any, captured: Captured, samples: list[dict[str, Tensor]]
):
    graph = captured("llama")
    by = RelevanceScore(level, preset="gradient", start="logit", baseline=baseline)
    got = Analyses(graph, Samples.of(samples)).get(by)
    assert got.higher_means == "important"
    parts = graph.blocks if level == "block" else graph.stream.sublayers
    runs = [_Recorded(graph) for _ in _rows(samples)]
    tops = [
        _top(run.logits(row, graph.outputs[0].name))
        for run, row in zip(runs, _rows(samples), strict=True)
    ]
    for part in parts:
        changes, gradients = [], []
        for run, top in zip(runs, tops, strict=True):
            added = run.named(part.exit.name) - run.named(part.entry.name)
            (gradient,) = torch.autograd.grad(top, run.named(part.exit.name), retain_graph=True)
            changes.append(added.detach().double())
            gradients.append(gradient.double())
        mean = torch.cat(changes).mean((0, 1)) if baseline == "mean" else 0.0
        effects = [float(((b - mean) * m).sum()) for b, m in zip(changes, gradients, strict=True)]
        expected = sum(map(abs, effects)) / len(effects)
        # Sums of 12 x 32 products of float32 that partly cancel.
        assert got.values[part.name] == pytest.approx(expected, rel=1e-3)


def test_how_samples_are_cut_and_padded_makes_no_difference(
    captured: Captured, samples: list[dict[str, Tensor]]
):
    graph = captured("llama")
    padded = [
        {
            "input_ids": nn.functional.pad(sample["input_ids"], (0, 3), value=5),
            "attention_mask": nn.functional.pad(sample["attention_mask"], (0, 3)),
        }
        for sample in samples
    ]
    scores: list[Analysis[Any]] = [
        RelevanceScore("sublayer", start="logit"),
        RelevanceBits(FORMATS, start="logit", int8_activations=False),
    ]
    for by in scores:
        together, apart, longer = (
            _answer(by, graph, some) for some in (samples, _rows(samples), padded)
        )
        # The same numbers of float32, and sums over more tokens in another order.
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(longer, together, rtol=2e-3, atol=1e-9)


def _answer(by: Analysis[Any], graph: Graph, samples: list[dict[str, Tensor]]) -> Tensor:
    report = Analyses(graph, Samples.of(samples)).get(by)
    values = getattr(report, "values", None)
    if values is not None:
        return torch.tensor(list(values.values()))
    return torch.tensor([list(losses.values()) for losses in report.losses.values()])


def test_a_branch_that_adds_nothing_goes_first(
    captured: Captured, samples: list[dict[str, Tensor]]
):
    graph = captured("llama")
    part = graph.stream.sublayers[1]
    site = next(site for site in find_sites(graph) if site.readers[0] is part.branch)
    graph.set_weight(site.node, torch.zeros_like(graph.weight(site.node)))
    report = Analyses(graph, Samples.of(samples)).get(RelevanceScore("sublayer"))
    assert report.order()[0] == part.name
    assert report.values[part.name] == 0.0


# ---- weights ------------------------------------------------------------------------------


def test_the_loss_of_a_weight_is_its_squared_effect_by_autograd(
    captured: Captured, samples: list[dict[str, Tensor]]
):
    graph = captured("llama")
    by = RelevanceBits(FORMATS, int8_activations=False, start="logit")
    got = Analyses(graph, Samples.of(samples)).get(by)
    assert got.unit == "relative"
    expected = {site.weight: dict.fromkeys(FORMATS, 0.0) for site in find_sites(graph)}
    for row in _rows(samples):
        run = _Recorded(graph)
        _top(run.logits(row, graph.outputs[0].name)).backward()
        for name, losses in expected.items():
            weight, gradient = run.leaves[name].detach(), run.leaves[name].grad
            assert gradient is not None
            for f in FORMATS:
                error = (dequantized(weight, f) - weight).double()
                losses[f] += 0.5 * float((error * gradient.double()).sum()) ** 2
    tokens = sum(sample["input_ids"].numel() for sample in samples)
    for name, losses in expected.items():
        for f in FORMATS:
            # A float32 sum of a thousand products of both signs, squared.
            assert got.losses[name][f] == pytest.approx(losses[f] / tokens, rel=5e-3, abs=1e-12)


def test_the_defaults_are_the_estimate_of_fisher(
    captured: Captured, samples: list[dict[str, Tensor]]
):
    analyses = Analyses(captured("llama"), Samples.of(samples))
    relevance = analyses.get(RelevanceBits(FORMATS, int8_activations=False))
    fisher = analyses.get(Fisher(FORMATS, int8_activations=False, draws=4))
    assert relevance.unit == fisher.unit
    for name, losses in fisher.losses.items():
        for f in FORMATS:
            # The same labels; only the order of sums in float32 differs.
            assert relevance.losses[name][f] == pytest.approx(losses[f], rel=5e-3, abs=1e-12)


class _Scaled(nn.Module):
    """A head on an input: the coefficient of its result is the seed."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Linear(64, 5, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x)}


def test_tables_of_positions_and_types_are_scored(captured: Captured, sample_inputs: SampleInputs):
    graph, samples = captured("bert"), Samples.of([sample_inputs("bert")])
    analyses = Analyses(graph, samples)
    relevance = analyses.get(RelevanceBits(FORMATS, int8_activations=False))
    fisher = analyses.get(Fisher(FORMATS, int8_activations=False, draws=4))
    tables = [site.weight for site in find_sites(graph) if site.role == "embedding"]
    assert len(tables) == 3
    assert not relevance.remarks
    for name, format in itertools.product(tables, FORMATS):
        # The same draws; only the order of sums in float32 differs.
        expected = pytest.approx(fisher.losses[name][format], rel=5e-3, abs=1e-12)
        assert relevance.losses[name][format] == expected
    assert all(any(relevance.losses[name].values()) for name in tables)


def test_the_rounding_of_inputs_is_added_entry_by_entry():
    model = _Scaled()
    graph = capture_module(model, {"x": torch.randn(2, 64)})
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    f = Format(4)
    analyses = Analyses(graph, Samples.of([{"x": x}]))
    without, with_it = (
        analyses.get(RelevanceBits((f,), int8_activations=int8, start="logit:2"))
        for int8 in (False, True)
    )
    change = (round_to_int8(x, f.block) - x) * model.head.weight[2].detach()
    expected = 0.5 * float(change.double().square().sum()) / len(x)
    added = with_it.losses["head.weight"][f] - without.losses["head.weight"][f]
    # float32 of products of two numbers.
    assert added == pytest.approx(expected, rel=1e-4)


def test_weights_that_do_not_fit_into_memory_take_more_runs(
    captured: Captured, samples: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
):
    analyses = Analyses(captured("llama"), Samples.of(samples))
    by = RelevanceBits((Format(4),), draws=1)
    together = analyses.get(by).losses
    monkeypatch.setattr("lamella.passes.scores.fisher._ERROR_BYTES", 60_000)
    apart = Analyses(analyses.graph, analyses.samples).get(by).losses
    assert list(apart) == list(together)
    for name, losses in together.items():
        # The same labels are drawn and the same products computed.
        assert apart[name][Format(4)] == pytest.approx(losses[Format(4)], rel=1e-5)


# ---- the share of a layer -----------------------------------------------------------------


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first = nn.Linear(32, 48, bias=False)
            self.second = nn.Linear(48, 6, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(torch.relu(self.first(x)))}


def test_the_share_of_a_layer_is_that_of_its_definition():
    model = _Mlp()
    graph = capture_module(model, {"x": torch.randn(2, 32)})
    canonicalize(graph)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    masses = {"first.weight": 0.0, "second.weight": 0.0}
    for row in x.double():
        hidden = torch.relu(model.first.weight.detach().double() @ row)
        logits = model.second.weight.detach().double() @ hidden
        best = int(logits.argmax())
        positive = (hidden * model.second.weight.detach().double()[best]).clamp(min=0)
        masses["second.weight"] += float(logits[best].abs())
        # z+ hands on what it gets, in proportion to positive contributions.
        masses["first.weight"] += float((positive / positive.sum() * logits[best]).abs().sum())
    total = sum(masses.values())
    got = Analyses(graph, Samples.of([{"x": x}])).get(LrpQvit(FORMATS))
    assert got.unit == "relative"
    for name, mass in masses.items():
        for f in FORMATS:
            expected = 0.0 if f.bits == 32 else mass / total * 4.0**-f.bits
            # The stabilizer of 1e-6, and float32.
            assert got.losses[name][f] == pytest.approx(expected, rel=1e-4)


def test_shares_of_layers_add_up_to_one(captured: Captured, sample_inputs: SampleInputs):
    graph = captured("vit")
    shares = layer_shares(graph, Samples.of([sample_inputs("vit", 3)]))
    assert sum(shares.values()) == pytest.approx(1.0, rel=1e-9)  # float64 division
    by_name: dict[str, Node] = {node.name: node for node in graph.nodes}
    targets = {by_name[name].target for name in shares}
    assert {aten.conv2d.default, aten.linear.default} <= targets
    assert len(targets) > 2  # the products of attention


# ---- everywhere ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "vit"])
@pytest.mark.parametrize(
    "a_pass",
    [
        DropBlocks(count=1, by="relevance", keep_first=0),
        DropSublayers(count=2, by="relevance", keep_first=0, keep_last=0),
        DropSublayers(count=2, by="relevance", iterative=True, keep_first=0, keep_last=0),
        AllocateBits(budget=4.5, by="relevance", min_size=0),
        AllocateBits(budget=4.5, by="lrp-qvit", min_size=0),
    ],
    ids=lambda one: one.spelling,
)
def test_passes_take_the_scores(
    family: str, a_pass: Transform, captured: Captured, sample_inputs: SampleInputs
):
    graph = captured(family)
    inputs = sample_inputs(family, 2)
    before = len(graph.stream.sublayers)
    a_pass.run(graph, Analyses(graph, Samples.of([inputs])))
    graph.finish()
    verify(graph)
    if isinstance(a_pass, AllocateBits):
        assert set(graph.plan) == {site.weight for site in find_sites(graph)}
    else:
        assert len(graph.stream.sublayers) == before - 2
    graph(**inputs)


def test_options_are_checked(captured: Captured):
    with pytest.raises(ValueError, match="unknown preset 'pc'"):
        RelevanceScore(preset="pc")
    with pytest.raises(ValueError, match="unknown seed 'logits'"):
        RelevanceBits(start="logits")
    with pytest.raises(ValueError, match="baseline must be zero or mean, got 'none'"):
        RelevanceScore(baseline="none")  # type: ignore[arg-type]
    for make in (RelevanceScore, RelevanceBits):
        with pytest.raises(ValueError, match="must be at least 1, got 0 and 1"):
            make(sequences=0, draws=1)
    with pytest.raises(ValueError, match="sequences must be at least 1, got 0"):
        LrpQvit(sequences=0)
    for by in (RelevanceScore(), RelevanceBits(FORMATS), LrpQvit(FORMATS)):
        with pytest.raises(SamplesError, match="needs data"):
            Analyses(captured("llama")).get(by)  # type: ignore[arg-type]
