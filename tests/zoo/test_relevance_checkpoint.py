"""Relevance with the activations of one block at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lamella.errors import GraphError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.passes.relevance.emit import emit
from lamella.passes.relevance.request import Request
from lamella.passes.relevance.taps import block_taps, head_taps, sublayer_taps
from lamella.rewrite.canonicalize import canonicalize
from lamella.rules.relevance.presets import PRESETS
from tests.zoo.families import FAMILIES
from tests.zoo.relevance_runs import double_inputs, in_double

Captured = Callable[[str], Graph]


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        *(("llama", "attnlrp"), ("t5", "attnlrp"), ("vit", "gamma"), ("resnet", "gamma")),
        *(("mamba", "mamba"), ("mixtral", "cp")),
    ],
)
def test_relevance_is_the_same(name: str, preset: str, captured: Captured):
    """Inputs, taps and ledger: decoders, an encoder with a decoder, images, scans, experts."""
    graph = captured(name)
    taps = (*block_taps(graph), *sublayer_taps(graph), *head_taps(graph))
    kept = emit(graph, PRESETS[preset], Request(taps=taps, ledger=True))
    again = emit(graph, PRESETS[preset], Request(taps=taps, ledger=True, checkpoint="blocks"))
    assert again.ledger == kept.ledger
    assert len(again.graph.nodes) > len(kept.graph.nodes)
    inputs = double_inputs(FAMILIES[name].inputs())
    wide = in_double(graph)(**inputs)
    seed = next(iter(wide.values())) if isinstance(wide, dict) else wide[0]
    want = in_double(kept.graph)(**inputs, seed=seed)
    got = in_double(again.graph)(**inputs, seed=seed)
    assert want.keys() == got.keys()
    for key, value in want.items():
        # The same operations on the same numbers; sums may be taken in other parts.
        torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-12)


def test_values_of_a_block_are_not_kept_for_the_sweep(captured: Captured):
    """What the forward of a block computes is read by the block and the one after it."""
    graph = captured("llama")
    made = emit(graph, PRESETS["attnlrp"], Request(checkpoint="blocks"))
    own = {node.name for node in graph.nodes if node.op == "call_function"}
    ends = {block.exit.name for block in graph.blocks} | {b.entry.name for b in graph.blocks}
    order = {node: place for place, node in enumerate(made.graph.nodes)}
    output = next(node for node in made.graph.nodes if node.name == graph.outputs[0].name)
    inside = {node.name for block in graph.blocks for node in block.nodes} & own - ends
    late = [
        node.name
        for node in order
        if node.name in inside and any(order[user] > order[output] for user in node.users)
    ]
    assert inside
    assert late == []


def test_without_blocks_there_is_nothing_to_compute_again():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    graph = capture_module(model, {"input": torch.ones(2, 3)}, dynamic=False)
    canonicalize(graph)
    with pytest.raises(GraphError, match="no blocks with a residual connection"):
        emit(graph, PRESETS["cp"], Request(checkpoint="blocks"))


def test_other_checkpoints_are_refused():
    with pytest.raises(ValueError, match="checkpoint must be 'blocks' or '', got 'block'"):
        Request(checkpoint="block")


def test_running_in_place_gives_the_same(captured: Captured):
    """Results that take over the memory of dead values, with and without checkpoints."""
    for name in ("llama", "resnet", "swin", "mamba2"):
        graph = captured(name)
        taps = (*block_taps(graph),)
        inputs = FAMILIES[name].inputs()
        before = {key: value.clone() for key, value in inputs.items()}
        for checkpoint in ("", "blocks"):
            request = Request(
                seed=lambda output: output, taps=taps, ledger=True, checkpoint=checkpoint
            )
            made = emit(graph, PRESETS["attnlrp"], request)
            want, got = made.graph(**inputs), made(**inputs)
            for key in made.results:
                # Kernels cut their loops by the alignment of memory: rounding of float32.
                atol = 1e-5 * float(want[key].abs().max())
                torch.testing.assert_close(got[key], want[key], rtol=0, atol=atol)
        assert all(torch.equal(inputs[key], value) for key, value in before.items())
