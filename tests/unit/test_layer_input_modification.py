"""LIM against the definition, on values from the hooks of the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.passes.analyses.layer_input_modification import LayerInputModification
from lamella.passes.base import Analyses


def test_lim_is_minus_the_mean_cosine_of_what_enters_and_leaves_a_block(
    captured: Callable[[str], Graph],
    model: Callable[[str], nn.Module],
    sample_inputs: Callable[..., dict[str, Tensor]],
):
    module = model("llama")
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in module.model.layers:
        layer.register_forward_hook(
            lambda _, args, output: seen.append((args[0], output)),
        )
    batch = sample_inputs("llama", 3, 8, 0)
    batch["attention_mask"][0, 5:] = 0
    with torch.no_grad():
        module(**batch)
    kept = batch["attention_mask"].bool()
    expected: list[float] = []
    for entry, leaving in seen:
        a, b = entry[kept].double(), leaving[kept].double()
        cosines = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        expected.append(-float(cosines.mean()))
    report = Analyses(captured("llama"), Samples.of([batch])).get(LayerInputModification())
    # Two float32 runs of the model with other kernels.
    assert list(report.values.values()) == pytest.approx(expected, abs=1e-5)
    assert list(report.values) == [f"model.layers.{i}" for i in range(3)]


def test_a_block_that_changes_nothing_scores_minus_one(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
):
    graph = captured("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        node = graph.weight_node(f"model.layers.1.{name}.weight")
        graph.set_weight(node, torch.zeros_like(graph.weight(node)))
    samples = Samples.of([sample_inputs("llama", 2, 8, 0)])
    values = Analyses(graph, samples).get(LayerInputModification()).values
    # Rounding of a float32 cosine.
    assert values["model.layers.1"] == pytest.approx(-1.0, abs=1e-6)
    assert min(values, key=values.__getitem__) == "model.layers.1"
