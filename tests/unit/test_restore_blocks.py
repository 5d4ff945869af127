"""Blocks of another checkpoint put in the place of one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import PassError
from lamella.ir.graph import Graph
from lamella.passes.base import Analyses
from lamella.passes.transforms.restore_blocks import RestoreBlocks


def _other(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = 0.7 * parameter.data
    return twin


@pytest.mark.parametrize(("family", "path"), [("llama", "model.layers"), ("gpt2", "transformer.h")])
def test_equals_the_model_with_those_layers(
    family: str,
    path: str,
    captured: Callable[[str], Graph],
    model: Callable[[str], nn.Module],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph, first, inputs = captured(family), model(family), sample_inputs(family)
    second = _other(first)
    RestoreBlocks(second, blocks=("1-2",)).run(graph, Analyses(graph))
    graph.finish()
    layers, theirs = first.get_submodule(path), second.get_submodule(path)
    for index in (1, 2):
        layers[index] = theirs[index]
    with torch.no_grad():
        want = first(**inputs)[0]
    # The same weights, sums of float32 in another order.
    torch.testing.assert_close(graph(**inputs)[0], want, rtol=1e-5, atol=1e-5)


def test_other_weights_stay(
    captured: Callable[[str], Graph], model: Callable[[str], nn.Module]
) -> None:
    graph = captured("llama")
    inside = {str(n.target) for n in graph.blocks[0].nodes if n.op == "get_attr"}
    before = {str(n.target): graph.weight(n) for n in graph.weight_nodes()}
    RestoreBlocks(_other(model("llama")), blocks=(0,)).run(graph, Analyses(graph))
    changed = {name for name, value in before.items() if graph.weight(name) is not value}
    assert changed == inside


def test_bad_options(captured: Callable[[str], Graph], model: Callable[[str], nn.Module]) -> None:
    with pytest.raises(ValueError, match="say which blocks"):
        RestoreBlocks("x")
    graph = captured("llama")
    with pytest.raises(PassError, match="there is no block 3"):
        RestoreBlocks(model("llama"), blocks=("2-3",)).run(graph, Analyses(graph))
