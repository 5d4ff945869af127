"""Analyses of activations and weights that scores are made of: against their definitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from torch import Tensor, nn
from torch.nn import functional

from lamella.data import Samples
from lamella.errors import PassError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, dequantized
from lamella.ir.reducers import RowMaxima, SampledRows
from lamella.ir.runner import Request, run_requests
from lamella.passes.analyses.activation_entropy import ActivationEntropy, clustered, entropy
from lamella.passes.analyses.outlier_ratio import OutlierRatio
from lamella.passes.analyses.row_errors import WHOLE, RowErrors
from lamella.passes.analyses.spikes import Spikes
from lamella.passes.analyses.z_score_distribution import ZScoreDistribution
from lamella.passes.base import Analyses
from lamella.passes.scores.prior import ZdBits

Captured = Callable[[str], Graph]
Inputs = Callable[..., dict[str, Tensor]]


def recorded(model: nn.Module, batches: list[dict[str, Tensor]], kind: type) -> dict[str, Tensor]:
    """The inputs of all modules of a kind over all batches, ``[tokens, channels]``, by hooks."""
    seen: dict[str, list[Tensor]] = {}
    kept: Tensor | slice = slice(None)

    def see(name: str, value: Tensor) -> None:
        seen.setdefault(name, []).append(value.flatten(0, -2)[kept])

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, kind)
    ]
    with torch.no_grad():
        for batch in batches:
            kept = mask_of(batch)
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def mask_of(batch: dict[str, Tensor]) -> Tensor | slice:
    """The tokens that are no padding."""
    return batch["attention_mask"].bool().flatten() if "attention_mask" in batch else slice(None)


# ---- reducers ------------------------------------------------------------------------------


def test_sampled_rows_and_maxima_do_not_depend_on_batches(
    captured: Captured, sample_inputs: Inputs
):
    graph = captured("llama")
    batch = sample_inputs("llama", 4, 16, 0)
    value = graph.blocks[0].exit
    wanted = [Request.of(SampledRows(10), value), Request.of(RowMaxima(), value)]
    together = run_requests(graph, [batch], wanted)
    singles = [{name: v[i : i + 1] for name, v in batch.items()} for i in range(4)]
    apart = run_requests(graph, singles, wanted)
    for request in wanted:
        torch.testing.assert_close(together[request], apart[request], rtol=1e-5, atol=1e-6)
    assert together[wanted[0]].shape[0] == 10
    assert together[wanted[1]].shape == (int(batch["attention_mask"].sum()),)


def test_sampled_rows_are_spread_evenly():
    rows = torch.arange(1000.0)[:, None]
    kept = SampledRows(50).result(SampledRows(50).add(None, rows)).flatten()
    counts = Counter((kept / 100).long().tolist())
    assert set(counts.values()) <= {4, 5, 6}
    other = SampledRows(50, seed=7).add(None, rows)
    assert not torch.equal(SampledRows(50).result(other).flatten(), kept)


# ---- spikes --------------------------------------------------------------------------------


class Spiking(nn.Module):
    """A first layer that reads what it is given, and one that reads the square of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(self.first(x).square())}


def test_spikes_are_the_largest_token_over_the_median_token():
    torch.manual_seed(0)
    model = Spiking()
    x = torch.randn(2, 9, 8)
    x[0, 0, 3] = 60.0
    graph = capture_module(model, {"x": torch.randn(2, 3, 8)})
    analyses = Analyses(graph, Samples.of([{"x": x[:1]}, {"x": x[1:]}]))
    report = analyses.get(Spikes(threshold=30.0))
    for name, rows in recorded(model, [{"x": x}], nn.Linear).items():
        sizes = sorted(float(row.abs().max()) for row in rows)
        # The lower of the two middle ones of 18 tokens.
        expected = sizes[-1] / sizes[8]
        assert report.ratios[f"{name}.weight"] == pytest.approx(expected, rel=1e-5)
    # A square makes a spike of 30 medians one of hundreds.
    assert report.spiky[0] == "second.weight"
    assert "times the median token" in report.reasons()["second.weight"]
    assert not analyses.get(Spikes(threshold=1e6)).reasons()


def test_spikes_leave_out_embeddings_and_take_thresholds_above_one(
    captured: Captured, sample_inputs: Inputs
):
    analyses = Analyses(captured("llama"), Samples.of([sample_inputs("llama", 2, 8, 0)]))
    report = analyses.get(Spikes())
    assert all(ratio >= 1.0 for ratio in report.ratios.values())
    assert not any("embed" in name for name in report.ratios)
    with pytest.raises(ValueError, match="threshold must be above 1"):
        Spikes(threshold=1.0)


# ---- outlier ratio -------------------------------------------------------------------------


def test_the_outlier_ratio_is_the_share_above_a_multiple_of_the_mean(
    captured: Captured, model: Callable[[str], nn.Module], sample_inputs: Inputs
):
    batches = [sample_inputs("llama", 2, 8, seed) for seed in range(2)]
    report = Analyses(captured("llama"), Samples.of(batches)).get(OutlierRatio(multiple=3.0))
    inputs = recorded(model("llama"), batches, nn.Linear)
    layers = model("llama").model.layers
    assert len(report.blocks) == len(layers)
    for index, layer in enumerate(layers):
        metrics = [
            module.weight.detach().double().abs()
            * inputs[f"model.layers.{index}.{name}"].double().norm(dim=0)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]
        metric = torch.cat([m.flatten() for m in metrics])
        expected = float((metric > 3.0 * metric.mean()).double().mean())
        # Float32 activations: single entries may lie on the border.
        assert report.blocks[f"model.layers.{index}"] == pytest.approx(expected, abs=2e-4)


# ---- entropy -------------------------------------------------------------------------------


def test_entropy_is_that_of_a_count():
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 5, 5])
    assert entropy(labels) == pytest.approx(1.5 * np.log(2), rel=1e-12)
    assert entropy(torch.zeros(7, dtype=torch.int64)) == 0.0


def test_clusters_are_those_of_scikit_learn_where_they_are_clear():
    points, _ = make_blobs(600, 8, centers=12, cluster_std=0.2, random_state=0)
    theirs = KMeans(12, n_init=10, random_state=0).fit_predict(points)
    expected = -sum(n / 600 * np.log(n / 600) for n in Counter(theirs.tolist()).values())
    found = [entropy(clustered(torch.tensor(points), 12, seed)) for seed in range(8)]
    # One run of ours against the best of ten of theirs: some seeds merge two blobs.
    assert max(found) == pytest.approx(expected, rel=1e-9)
    assert min(found) > expected - 0.3


def test_the_entropy_of_a_block_is_that_of_its_tokens(
    captured: Captured, model: Callable[[str], nn.Module], sample_inputs: Inputs
):
    batches = [sample_inputs("llama", 4, 16, seed) for seed in range(2)]
    analyses = Analyses(captured("llama"), Samples.of(batches))
    report = analyses.get(ActivationEntropy(clusters=5))
    with torch.no_grad():
        hidden = [model("llama")(**b, output_hidden_states=True).hidden_states for b in batches]
    pairs = zip(hidden, batches, strict=True)
    rows = torch.cat([states[1].flatten(0, 1)[mask_of(b)] for states, b in pairs])
    order = SampledRows(4096).add(None, rows)[0]
    expected = entropy(clustered(order, 5, 0))
    # The same rows up to the rounding of float32.
    assert report.blocks["model.layers.0"] == pytest.approx(expected, rel=1e-6)
    assert all(0.0 < value <= np.log(5) for value in report.blocks.values())


def test_too_few_tokens_for_the_clusters_are_reported(captured: Captured, sample_inputs: Inputs):
    samples = Samples.of([sample_inputs("llama", 2, 8, 0)])
    analyses = Analyses(captured("llama"), samples)
    analyses.get(ActivationEntropy())
    (remark,) = analyses.take_remarks()
    assert "tokens; 100 clusters need 100" in remark
    with pytest.raises(PassError, match="strict"):
        Analyses(captured("llama"), samples, strict=True).get(ActivationEntropy())
    with pytest.raises(ValueError, match="clusters must be at least 2"):
        ActivationEntropy(clusters=1)


# ---- forms of ZD ---------------------------------------------------------------------------


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("threshold", [1.0, 2.5])
def test_forms_of_zd(
    both_sides: bool,
    pooled: bool,
    threshold: float,
    captured: Captured,
    model: Callable[[str], nn.Module],
):
    analyses = Analyses(captured("llama"))
    report = analyses.get(ZScoreDistribution(both_sides, threshold, pooled))
    for index, layer in enumerate(model("llama").model.layers):
        matrices = [p.detach().double().flatten() for p in layer.parameters() if p.ndim > 1]
        groups = [torch.cat(matrices)] if pooled else matrices
        shares: list[float] = []
        for group in groups:
            z = (group - group.mean()) / group.std(correction=0)
            shares.append(float(((z.abs() if both_sides else z) > threshold).double().mean()))
        expected = sum(shares) / len(shares)
        assert report.blocks[f"model.layers.{index}"] == pytest.approx(expected, rel=1e-12)
    losses = analyses.get(ZdBits((Format(4),), both_sides, threshold, pooled)).losses
    assert all(loss[Format(4)] > 0.0 for loss in losses.values())


def test_a_threshold_of_zd_is_positive():
    with pytest.raises(ValueError, match="threshold must be positive"):
        ZScoreDistribution(threshold=0.0)


# ---- errors of rows ------------------------------------------------------------------------


def test_row_errors_are_mean_squares_of_each_output():
    torch.manual_seed(0)
    layer = nn.Linear(40, 6, bias=False)
    x = torch.randn(30, 4, 40) * torch.linspace(0.1, 3, 40)
    graph = capture_module(layer, {"input": x[:2]})
    f = Format(4)
    samples = Samples.of([{"input": x[:11]}, {"input": x[11:]}])
    (rows,) = Analyses(graph, samples).get(RowErrors((f, Format(32)))).layers.values()
    weight = layer.weight.detach()
    for key, value in ((f, dequantized(weight, f) - weight), (WHOLE, weight)):
        expected = functional.linear(x, value).double().square().flatten(0, 1).mean(0)
        # Float32 Gram matrices.
        torch.testing.assert_close(rows[key], expected, rtol=1e-5, atol=0.0)
