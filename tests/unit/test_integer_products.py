"""The score of products of integers, beside the measured loss of single layers that run so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from lamella.data import Samples
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.ir.quantize import integers
from lamella.passes.base import Analyses
from lamella.passes.scores.integer_products import IntegerProducts
from lamella.passes.scores.target import loss_target, single_sequences
from lamella.passes.sites import Site, find_sites
from lamella.rewrite.canonicalize import canonicalize

NUMERICS = ("int8-rows", "int8-tensor", "int8-static")


def as_integers(graph: Graph, site: Site, numerics: str, ends: dict[str, Tensor]) -> Graph:
    """The model with one layer as the operator that kernels stand for."""
    edited = graph.copy()
    weight = edited.weight_node(site.weight)
    held = integers(graph.weight(site.node))
    codes = edited.add_weight("codes", held.codes)
    scales = edited.add_weight("scales", held.scales)
    for layer in list(weight.users):
        args = (edited.operand(layer, "input"), codes, scales, edited.operand(layer, "bias"))
        target, rest = lam.linear_int8.default, (numerics == "int8-rows",)
        if numerics == "int8-static":
            low, high = min(float(ends[layer.name][0]), 0.0), max(float(ends[layer.name][1]), 0.0)
            step = (high - low) / 255
            target, rest = lam.linear_int8_static.default, (step, round(-low / step))
        edited.replace(layer, edited.call(target, *args, *rest, before=layer))
    edited.finish()
    return edited


def extremes(graph: Graph, samples: Samples) -> dict[str, Tensor]:
    """The least and the largest entry that every linear layer reads, by running node by node."""
    found: dict[str, list[Tensor]] = {}

    class Seen(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            if n.target is torch.ops.aten.linear.default:
                value = self.env[n.args[0]]
                found.setdefault(n.name, []).append(torch.stack(value.aminmax()))
            return super().run_node(n)

    for batch in samples:
        Seen(graph.module).run(*graph.signature.flatten((), dict(batch)))
    return {
        name: torch.stack([torch.stack(ends)[:, 0].min(), torch.stack(ends)[:, 1].max()])
        for name, ends in found.items()
    }


def measured(graph: Graph, edited: Graph, samples: Samples) -> float:
    """The loss per token, each sequence alone."""
    target = loss_target(graph)
    place = list(graph.outputs).index(target.node)
    total, tokens = 0.0, 0
    for sample in single_sequences(samples):
        rows = []
        for model in (graph, edited):
            value = model.run(graph.signature.flatten((), dict(sample)))[place]
            value = value.reshape(-1, value.shape[-1])
            rows.append(value[sample["attention_mask"].bool().flatten()] if target.mask else value)
        total += target.loss(*rows)
        tokens += len(rows[0])
    return total / tokens


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_it_predicts_what_is_measured(
    family: str, captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    graph = captured(family)
    samples = Samples.of([sample_inputs(family, 8, 16, seed) for seed in range(4)])
    report = Analyses(graph, samples).get(IntegerProducts())
    sites = [site for site in find_sites(graph) if site.linears][::2]
    ends = extremes(graph, samples)
    pairs: list[tuple[float, float]] = []
    for numerics in NUMERICS:
        for site in sites:
            truth = measured(graph, as_integers(graph, site, numerics, ends), samples)
            # A layer that the compared output does not depend on loses nothing.
            if truth > 1e-10:
                pairs.append((report.losses[site.weight][numerics], truth))
    predicted, truth = torch.tensor(pairs).T
    # 32 sequences with 4 draws each: single values are known to some 15 %.
    assert spearmanr(predicted, truth).statistic > 0.94
    assert 0.8 < float((predicted / truth).median()) < 1.25


class Spiky(nn.Module):
    """A head whose input has one large entry in the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 5, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x)}


def test_one_scale_for_an_input_with_a_spike_costs_more_than_one_for_each_row() -> None:
    torch.manual_seed(0)
    model = Spiky()
    graph = capture_module(model, {"x": torch.randn(2, 7, 64)})
    canonicalize(graph)
    x = torch.randn(16, 64, 64)
    x[:, 0, 3] = 100.0
    report = Analyses(graph, Samples.of([{"x": x}])).get(IntegerProducts(draws=16))
    losses = report.losses["head.weight"]
    assert report.order("int8-rows") == ("head.weight",)
    assert losses["int8-tensor"] > 5 * losses["int8-rows"]
    # By the definition: the second-order loss of the changed logits.
    with torch.no_grad():
        held = integers(model.head.weight)
        p = model(x)["logits"].double().softmax(-1)
        step = x.abs().amax(-1, keepdim=True) / 127
        rounded = (x / step).round() * step
        change = (functional.linear(rounded, held.dequantized()) - model(x)["logits"]).double()
        # The gradients of tokens are independent, so that the squares of their effects add up.
        expected = 0.5 * ((p * change.square()).sum(-1) - (p * change).sum(-1).square()).mean()
    # 256 draws of a sum over 64 tokens; squares spread by 1.4 times their mean.
    assert losses["int8-rows"] == pytest.approx(float(expected), rel=0.25)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"got 'int8-row'; did you mean 'int8-rows'"):
        IntegerProducts(("int8-row",))
    with pytest.raises(ValueError, match="at least 1"):
        IntegerProducts(sequences=0)
