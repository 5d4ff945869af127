"""The relevance analysis, its seeds, and the interface of the emitter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.data import Samples
from lamella.errors import GraphError, MissingRuleError, SamplesError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.passes.analyses.relevance import Relevance
from lamella.passes.analyses.relevance_report import RelevanceReport
from lamella.passes.base import Analyses
from lamella.passes.relevance.emit import emit
from lamella.passes.relevance.request import Request, Tap
from lamella.passes.relevance.seeds import (
    At,
    Contrastive,
    Difference,
    Logit,
    SoftmaxGradient,
    parse_seed,
)
from lamella.rewrite.canonicalize import canonicalize
from lamella.rules.relevance.contraction import epsilon, linear
from lamella.rules.relevance.elementwise import stabilized_activations
from lamella.rules.relevance.presets import CP, GRADIENT, PRESETS, Preset, gamma, preset_of
from lamella.rules.table import RuleTable

Captured = Callable[[str], Graph]
SampleInputs = Callable[..., dict[str, Tensor]]


def graph_of(module: nn.Module, *inputs: Tensor) -> Graph:
    """The canonical graph of a module whose input is called `x`."""
    graph = capture_module(module.eval(), {"x": inputs[0]})
    canonicalize(graph)
    return graph


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def report(graph: Graph, batches: list[dict[str, Tensor]], **options: Any) -> RelevanceReport:
    return Analyses(graph, Samples.of(batches)).get(Relevance(**options))


# ---- seeds --------------------------------------------------------------------------------

Y = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(2))


def test_seeds_are_what_their_definitions_say():
    best = Y.argmax(-1)
    top = nn.functional.one_hot(best, 7).float()
    assert torch.equal(Logit()(Y), top)
    assert torch.equal(Logit(3)(Y).sum((0, 1)), 10 * torch.eye(7)[3])
    last = Logit(3, position=-1)(Y)
    assert float(last.sum()) == 2
    assert torch.equal(last[:, -1], torch.eye(7)[3].expand(2, 7))
    label = torch.tensor([1, 6])
    assert torch.equal(Logit()(Y, label)[1], torch.eye(7)[6].expand(5, 7))
    # Rounding of -1/7 in float32.
    torch.testing.assert_close(Contrastive()(Y), torch.where(top == 1, 1.0, -1 / 7), **CLOSE)
    assert torch.equal(Difference(1, 2)(Y)[0, 0], torch.eye(7)[1] - torch.eye(7)[2])
    one = At((1, -1, 3))(Y)
    assert float(one.sum()) == 1
    assert float(one[1, 4, 3]) == 1


CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def test_the_softmax_seed_is_a_gradient():
    y = Y.double().requires_grad_()
    (want,) = torch.autograd.grad(torch.softmax(y, -1)[..., 2].sum(), y)
    got = SoftmaxGradient(2)(y.detach())
    # A few products in float64.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_seeds_as_text():
    assert parse_seed("logit") == Logit()
    assert parse_seed("logit:7", -1) == Logit(7, -1)
    assert parse_seed("difference:7,9") == Difference(7, 9)
    assert parse_seed("softmax:1") == SoftmaxGradient(1)
    for text, message in (
        ("logits", "unknown seed 'logits'; did you mean 'logit'"),
        ("logit:a", "names its classes wrong"),
        ("logit:1,2", "names its classes wrong"),
        ("difference:3", "needs two classes"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_seed(text)


def test_a_seed_outside_of_the_output_is_refused():
    with pytest.raises(ValueError, match="no place 9 on an axis of size 7"):
        Logit(9)(Y)
    with pytest.raises(ValueError, match="more axes than the output"):
        At((0, 0, 0, 0))(Y)


def test_relevance_is_linear_in_the_seed():
    graph = graph_of(Mlp(), X)
    made = emit(graph, preset_of("gamma"))
    seeds = [torch.randn(3, 4, generator=torch.Generator().manual_seed(s)) for s in (3, 4)]
    parts = [made.graph(x=X, seed=seed)["relevance.x"] for seed in seeds]
    whole = made.graph(x=X, seed=2 * seeds[0] - 3 * seeds[1])["relevance.x"]
    # Sums of eight products in float32.
    torch.testing.assert_close(whole, 2 * parts[0] - 3 * parts[1], rtol=1e-4, atol=1e-5)


# ---- the emitter --------------------------------------------------------------------------


def test_a_missing_rule_is_an_error_that_lists_all():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.erfinv(torch.tanh(x)) + torch.lgamma(x) + torch.erfinv(torch.sin(x))

    graph = graph_of(Odd(), X)
    with pytest.raises(MissingRuleError) as error:
        emit(graph, CP)
    assert "aten.erfinv.default (x2), aten.lgamma.default (x1) in preset 'cp'" in str(error.value)
    assert "RuleTable.extend" in str(error.value)


def test_a_user_gives_rules_and_chooses_them_by_place():
    graph = graph_of(Mlp(), X)
    seed = torch.ones(3, 4)

    def twice(coefficient: Tensor, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor):
        kept = coefficient.abs().sqrt() * 0 + coefficient * 2
        return kept @ weight, None, None

    mine = Preset("mine", CP.table.override({aten.linear.default: twice}))
    got = emit(graph, mine).graph(x=X, seed=seed)["relevance.x"]
    plain = emit(graph, CP).graph(x=X, seed=seed)["relevance.x"]
    # Two layers; the kept part is exact.
    torch.testing.assert_close(got, 4 * plain, rtol=1e-5, atol=1e-6)
    first = graph.find(aten.linear.default)[0].name
    once = CP.where(lambda place: twice if place.node.name == first else None, name="first twice")
    assert once.name == "first twice"
    got = emit(graph, once).graph(x=X, seed=seed)["relevance.x"]
    torch.testing.assert_close(got, 2 * plain, rtol=1e-5, atol=1e-6)
    stable = CP.table.override({aten.linear.default: epsilon(linear, 1e9)})
    gone = emit(graph, Preset("absorbs", stable)).graph(x=X, seed=seed)["relevance.x"]
    assert float(gone.abs().max()) < 1e-6


class Applied(nn.Module):
    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_activations_divide_with_a_stabilizer_where_it_is_asked_for():
    x = torch.linspace(-2.0, 2.0, 7, dtype=torch.float64)[None]
    functions = (nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Mish(), nn.ReLU(), nn.Hardswish(), nn.ELU())
    for function in functions:
        graph = graph_of(Applied(function), x)
        preset = CP.where(stabilized_activations(0.1))
        got = emit(graph, preset).graph(x=x, seed=torch.ones_like(x))["relevance.x"]
        # One quotient and one product in float64.
        torch.testing.assert_close(got, x * function(x) / (x + 0.1), rtol=1e-12, atol=1e-14)


def test_an_operator_of_the_user_is_added_to_the_table():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.lgamma(x)

    graph = graph_of(Odd(), X)
    table = RuleTable("relevance", {**dict(GRADIENT.table.items())}).extend(
        {aten.lgamma.default: lambda coefficient, output, self: (coefficient * 3.0,)}
    )
    got = emit(graph, Preset("with lgamma", table)).graph(x=X, seed=torch.ones(3, 6))
    torch.testing.assert_close(got["relevance.x"], 3 * X, rtol=0, atol=0)


def test_taps_read_values_and_coefficients():
    graph = graph_of(Mlp(), X)
    first, second = graph.find(aten.linear.default)
    taps = (
        Tap("value", (first.name,), lambda pair: pair[0]),
        Tap("coefficient", (second.name,), lambda pair: pair[1]),
        Tap("product", (first.name, second.name), lambda a, b: a[1].sum() * b[1].sum()),
        Tap("weight", (first.args[1].name,), lambda pair: pair[1]),
    )
    seed = torch.full((3, 4), 2.0)
    out = emit(graph, GRADIENT, Request(inputs=False, taps=taps)).graph(x=X, seed=seed)
    assert not [name for name in out if name.startswith("relevance.")]
    torch.testing.assert_close(out["tap.value"], Mlp().first(X), rtol=1e-6, atol=1e-6)
    assert torch.equal(out["tap.coefficient"], seed)
    assert not out["tap.weight"].any()
    assert out["tap.product"].ndim == 0


def test_only_what_is_wanted_is_computed(captured: Captured):
    graph = captured("llama")
    last = graph.blocks[-1].exit.name
    whole = emit(graph, PRESETS["attnlrp"])
    tap = (Tap("last", (last,), lambda pair: pair[0] * pair[1]),)
    part = emit(graph, PRESETS["attnlrp"], Request(inputs=False, taps=tap))
    assert len(part.graph.nodes) < (len(graph.nodes) + len(whole.graph.nodes)) / 2
    # Under cp no relevance passes queries and keys: half of the linear layers of attention.
    counts = {
        name: len(emit(graph, PRESETS[name]).graph.find(aten.matmul.default))
        for name in ("cp", "attnlrp")
    }
    assert counts["cp"] < counts["attnlrp"] / 1.5


def test_bad_requests_are_refused(captured: Captured):
    graph = captured("llama")
    with pytest.raises(GraphError, match="no output 'logit'; did you mean 'logits'"):
        emit(graph, CP, Request(output="logit"))
    with pytest.raises(GraphError, match="has 1 outputs, there is no output 1"):
        emit(graph, CP, Request(output=1))
    with pytest.raises(GraphError, match="no node called 'linearr'; did you mean 'linear"):
        emit(graph, CP, Request(taps=(Tap("a", ("linearr",), lambda pair: pair[0]),)))

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0).float()

    with pytest.raises(GraphError, match="does not depend on a value whose relevance"):
        emit(graph_of(Constant(), X), CP)


def test_the_graph_of_the_model_is_left_as_it_is(captured: Captured):
    graph = captured("resnet")
    before, edits = str(graph), graph.edits
    emit(graph, gamma())
    assert (str(graph), graph.edits) == (before, edits)


def test_masked_rows_give_numbers(captured: Captured, sample_inputs: SampleInputs):
    """A row whose tokens are all hidden, in a model whose masks are added and one of booleans."""
    for family in ("llama", "bert", "deberta-v2"):
        made = emit(captured(family), PRESETS["attnlrp"], Request(ledger=True))
        inputs = sample_inputs(family)
        inputs["attention_mask"][0] = 0
        shape = captured(family)(**inputs)[0].shape
        out = made.graph(**inputs, seed=torch.ones(shape))
        found = [out["relevance.input_ids"], out["ledger.leaks"]]
        assert all(bool(torch.isfinite(value).all()) for value in found)


# ---- the analysis -------------------------------------------------------------------------


def test_cutting_samples_into_batches_makes_no_difference(
    captured: Captured, sample_inputs: SampleInputs
):
    graph, batch = captured("llama"), sample_inputs("llama", 4, 7)
    singles = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    whole = report(graph, [batch], preset="attnlrp", ledger=True)
    parts = report(graph, singles, preset="attnlrp", ledger=True)
    assert whole.rows == parts.rows == 4
    # Other kernels for other shapes, in float32; relative to the mass.
    scale = whole.inputs["input_ids"].mass
    assert whole.start == pytest.approx(parts.start, rel=1e-5)
    for one, two in zip(whole.operations, parts.operations, strict=True):
        assert one.node == two.node
        assert one.amounts.mass == pytest.approx(two.amounts.mass, rel=1e-4, abs=1e-5 * scale)
    for one, two in zip(whole.sublayers, parts.sublayers, strict=True):
        assert one.share == pytest.approx(two.share, rel=1e-3)
    assert whole.ledger.keys() == parts.ledger.keys()


def test_a_model_without_losses_conserves_through_every_block(
    captured: Captured, sample_inputs: SampleInputs
):
    """Under cp a llama has no bias, no softmax and no gate that relevance is lost in."""
    found = report(captured("llama"), [sample_inputs("llama")], ledger=True)
    assert abs(found.closure) < 1e-6
    assert found.inputs["input_ids"].flow == pytest.approx(found.start, rel=1e-5)
    for block in found.blocks:
        assert block.amounts is not None
        assert block.amounts.flow == pytest.approx(found.start, rel=1e-5)
        assert block.amounts.positive <= block.amounts.mass
    assert [part.kind for part in found.sublayers] == ["attention", "mlp"] * 3
    assert all(0 < part.share < 1 for part in found.sublayers)
    attention = [op for op in found.operations if "attention" in op.operator]
    for heads, whole in zip(found.heads, attention, strict=True):
        assert len(heads.heads) == 4
        flow = sum(head.flow for head in heads.heads)
        # The same products summed in another order.
        assert flow == pytest.approx(whole.amounts.flow, rel=1e-6)


def test_activations_of_one_block_at_a_time_give_the_same(
    captured: Captured, sample_inputs: SampleInputs
):
    graph, batch = captured("llama"), [sample_inputs("llama")]
    kept, again = (report(graph, batch, checkpoint=mode) for mode in ("", "blocks"))
    # The same operations on the same numbers.
    assert again.start == kept.start
    assert again.inputs == kept.inputs
    assert again.sublayers == kept.sublayers
    assert again.heads == kept.heads


def test_labels_take_the_place_of_the_largest(captured: Captured, sample_inputs: SampleInputs):
    graph, batch = captured("vit"), sample_inputs("vit", 3)
    logits = graph(**batch).logits
    labels = tuple(logits.argmax(-1).tolist())
    free = report(graph, [batch], preset="gamma")
    given = report(graph, [batch], preset="gamma", labels=labels)
    assert given.start == pytest.approx(free.start, rel=1e-6)
    assert given.start == pytest.approx(float(logits.amax(-1).mean()), rel=1e-5)
    with pytest.raises(SamplesError, match="there are 4 labels for 3 rows"):
        report(graph, [batch], labels=(0, 1, 2, 3))
    with pytest.raises(SamplesError, match="there are 2 labels, and more rows"):
        report(graph, [batch], labels=(0, 1))


def test_folded_batch_norms_are_told_by_their_names(
    captured: Captured, sample_inputs: SampleInputs
):
    found = report(captured("resnet"), [sample_inputs("resnet")], preset="eps-plus", ledger=True)
    assert any(op.operator == "aten.batch_norm.default" for op in found.operations)
    assert abs(found.closure) < 1e-4
    assert found.ledger["bias"] != 0


def test_options_are_checked():
    for options, message in (
        ({"preset": "attn-lrp"}, "unknown preset 'attn-lrp'; did you mean 'attnlrp'"),
        ({"seed": "max"}, "unknown seed 'max'"),
        ({"taps": ("nodes",)}, "unknown taps nodes; known are operations"),
        ({"checkpoint": "layers"}, "checkpoint must be 'blocks'"),
    ):
        with pytest.raises(ValueError, match=message):
            Relevance(**options)
    assert Relevance().spelling == "relevance"
    assert Relevance(preset="relp", position=-1).spelling == "relevance preset=relp position=-1"


def test_hidden_tokens_start_nothing(captured: Captured, sample_inputs: SampleInputs):
    graph = captured("llama")
    one = sample_inputs("llama", 1, 7)
    padded = {name: nn.functional.pad(value, (0, 3), value=0) for name, value in one.items()}
    assert int(padded["attention_mask"][0, -1]) == 0
    short, long = (report(graph, [batch]) for batch in (one, padded))
    # Other kernels for other shapes, in float32.
    assert long.start == pytest.approx(short.start, rel=1e-5)
    assert long.inputs["input_ids"].mass == pytest.approx(short.inputs["input_ids"].mass, rel=1e-4)
