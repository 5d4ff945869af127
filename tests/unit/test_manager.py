"""Pipelines: what is recorded, and that a failed one leaves no trace."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from lamella.errors import LossError, NumericError, PassError, SamplesError, VerificationError
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.passes.base import Effect, Transform
from lamella.passes.manager import run_passes
from lamella.passes.numerics import NumericCheck
from lamella.report import Report
from tests.unit.planted import (
    DropBranch,
    LeaveDropout,
    LyingShrink,
    MakeNaN,
    Nothing,
    Raise,
    RoundToHalf,
    ScaleBack,
    Shrink,
    WrongDtype,
    WrongShape,
    network,
)

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def state(graph: Graph) -> tuple[str, dict[str, Tensor], Tensor]:
    """Everything that a failed pipeline must leave as it was."""
    weights = {str(node.target): graph.weight(node).clone() for node in graph.weight_nodes()}
    return str(graph), weights, graph(input_ids=IDS)["logits"]


def assert_same_state(graph: Graph, before: tuple[str, dict[str, Tensor], Tensor]) -> None:
    text, weights, logits = state(graph)
    assert text == before[0]
    assert weights.keys() == before[1].keys()
    # Not a bit may differ: the graph is restored, not repaired.
    assert all(torch.equal(value, before[1][name]) for name, value in weights.items())
    assert torch.equal(logits, before[2])


def test_a_pipeline_records_what_each_pass_did():
    graph = network()
    before = len(graph.nodes)
    report = run_passes(graph, [Nothing(), ScaleBack(4.0), RoundToHalf(), DropBranch(), Shrink()])
    nothing, scale, half, drop, shrink = report.passes
    assert [record.edits for record in report.passes] == [0, 3, 9, 1, 1]
    assert (nothing.deviation, nothing.loss) == (None, None)
    assert scale.options == {"factor": 4.0}
    # A power of two scales without rounding.
    assert scale.deviation == 0.0
    assert half.deviation is not None
    assert 0 < half.deviation < 1e-2
    assert drop.operators_removed["aten.linear.default"] == 2
    assert drop.operators_added == {}
    assert drop.nodes_before == before
    assert drop.nodes_after == len(graph.nodes)
    # The two layers and the norm of the branch: 16 x 32 twice, their biases, the norm.
    assert drop.weight_bytes_before - drop.weight_bytes_after == 4 * (2 * 512 + 48 + 32)
    assert drop.remarks == ("one branch went",)
    assert drop.loss is not None
    assert drop.loss.source == "probes"
    assert shrink.loss is not None
    assert shrink.loss.value > drop.loss.value
    assert report.loss == shrink.loss
    assert all(r.seconds > 0 and r.verify_seconds > 0 for r in report.passes)


def test_a_report_survives_json():
    report = run_passes(network(), [ScaleBack(), Shrink()], samples=[{"input_ids": IDS}])
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_the_loss_is_that_of_a_literal_reimplementation():
    graph = network()
    was = graph(input_ids=IDS)
    report = run_passes(graph, [Shrink(0.7)], samples=[{"input_ids": IDS}])
    now = graph(input_ids=IDS)
    p, q = was["logits"].double().softmax(-1), now["logits"].double().softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    loss = report.loss
    assert loss is not None
    logits, hidden = loss.outputs
    # log_softmax in float32 against softmax in float64.
    assert logits.value == pytest.approx(float(divergence.mean()), rel=1e-4, abs=1e-7)
    assert logits.maximum == pytest.approx(float(divergence.max()), rel=1e-4, abs=1e-7)
    assert logits.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert (hidden.measure, hidden.value) == ("cosine", pytest.approx(0, abs=1e-12))
    assert loss.source == "samples"
    assert loss.value == logits.value


def test_the_loss_is_against_the_original_not_against_the_pass_before():
    report = run_passes(network(), [Shrink(0.5), Shrink(2.0)], samples=[{"input_ids": IDS}])
    first, second = (record.loss for record in report.passes)
    assert first is not None
    assert second is not None
    assert first.value > 1e-4
    # Halving and doubling is exact in floating point.
    assert second.value == 0.0


@pytest.mark.parametrize(
    ("culprit", "error"),
    [
        (LyingShrink(), NumericError),
        (MakeNaN(), NumericError),
        (Raise(KeyError), KeyError),
        (Raise(KeyboardInterrupt), KeyboardInterrupt),
    ],
    ids=lambda value: getattr(value, "spelling", None),
)
def test_a_failed_pipeline_leaves_no_trace(culprit: Transform, error: type[BaseException]):
    graph = network()
    before = state(graph)
    with pytest.raises(error) as caught:
        run_passes(graph, [ScaleBack(), RoundToHalf(), culprit])
    assert_same_state(graph, before)
    notes = "\n".join(caught.value.__notes__)
    assert f"in pass 3 of 3: {culprit.spelling!r}" in notes
    assert f"set_weight of {'up' if culprit.name == 'raise' else 'head'}_weight" in notes
    assert f"by {culprit.name}" in notes


@pytest.mark.parametrize(
    "culprit", [WrongShape(), WrongDtype(), LeaveDropout()], ids=lambda value: value.name
)
def test_a_broken_invariant_is_found_by_the_verifier(culprit: Transform):
    graph = network()
    before = state(graph)
    with pytest.raises(VerificationError):
        run_passes(graph, [culprit])
    assert_same_state(graph, before)


def test_a_loss_above_the_limit_stops_the_pipeline():
    graph = network()
    before = state(graph)
    says = r"'shrink factor=0\.1' costs kl .* allowed is a loss of"
    with pytest.raises(LossError, match=says) as caught:
        run_passes(graph, [Shrink(0.999), Shrink(0.1)], max_loss=1e-4)
    assert caught.value.__notes__ == ["in pass 2 of 2: 'shrink factor=0.1'"]
    assert_same_state(graph, before)
    assert run_passes(graph, [Shrink(0.999)], max_loss=1e-4).loss is not None


def test_samples_are_checked_before_the_first_pass():
    graph = network()
    edits = graph.edits
    with pytest.raises(SamplesError, match=r"input 'input_ids' of sample 1 is torch.float32"):
        run_passes(graph, [Shrink()], samples=[{"input_ids": IDS}, {"input_ids": IDS.float()}])
    assert graph.edits == edits


def test_a_graph_without_data_is_edited_but_not_compared():
    graph = network()
    for node in graph.weight_nodes():
        graph.set_weight(node, graph.weight(node).to("meta"))
    report = run_passes(graph.copy(), [DropBranch()])
    assert any("outputs were not compared" in remark for remark in report.passes[0].remarks)
    with pytest.raises(PassError, match=r"max_loss can't be checked: weight '.*' has no data"):
        run_passes(graph, [DropBranch()], max_loss=0.1)


def test_text_is_not_a_pass():
    with pytest.raises(TypeError, match="pass 1 is a str, not a Transform"):
        run_passes(network(), ["shrink"])  # type: ignore[list-item]


def test_one_limit_for_the_loss():
    with pytest.raises(ValueError, match="give max_loss either"):
        run_passes(network(), [], max_loss=1.0, instruments=[NumericCheck()])
    with pytest.raises(ValueError, match="max_loss must be 0 or more, got nan"):
        run_passes(network(), [], max_loss=float("nan"))


def test_dead_code_goes_after_every_pass():
    graph = network()
    run_passes(graph, [DropBranch()])
    assert not graph.find(aten.relu.default, aten.layer_norm.default)
    assert {str(node.target) for node in graph.weight_nodes()} == {
        "table.weight",
        "head.weight",
        "head.bias",
    }


def test_effects_have_the_names_of_the_report():
    assert {effect.value for effect in Effect} == {"exact", "rounding", "lossy"}
