"""Relevance graphs of all families through ONNX Runtime, at the captured and at other sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.ir.graph import Graph
from lamella.passes.relevance.emit import emit
from lamella.passes.relevance.request import Request
from lamella.rules.relevance.presets import PRESETS
from tests.zoo.families import FAMILIES

Captured = Callable[[str], Graph]

TOLERANCE = 1e-4
"""Of the largest relevance; two libraries order float32 sums in their own ways."""


def assert_agrees(graph: Graph, name: str, preset: str) -> None:
    made = emit(graph, PRESETS[preset], Request(seed=lambda output: output))
    executable = OnnxRuntimeBackend(threads=1).lower(made.graph)
    for batch, sequence in FAMILIES[name].sizes()[:2]:
        inputs = FAMILIES[name].inputs(batch, sequence)
        want: dict[str, Tensor] = made.graph(**inputs)
        got: dict[str, Tensor] = executable(**inputs)
        assert set(got) == set(want)
        for key in (key for key in want if key.startswith("relevance.")):
            atol = TOLERANCE * float(want[key].abs().max())
            torch.testing.assert_close(got[key], want[key], rtol=0, atol=atol)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("preset", ["attnlrp", "gamma"])
def test_relevance_is_that_of_pytorch(name: str, preset: str, captured: Captured):
    assert_agrees(captured(name), name, preset)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "resnet", "t5"])
def test_gradients_and_ledgers_are_those_of_pytorch(name: str, captured: Captured):
    graph = captured(name)
    request = Request(seed=lambda output: output, ledger=True)
    made = emit(graph, PRESETS["gradient"], request)
    executable = OnnxRuntimeBackend(threads=1).lower(made.graph)
    inputs = FAMILIES[name].inputs()
    want, got = made.graph(**inputs), executable(**inputs)
    scale = float(want["start"].abs())
    for key in ("start", "ledger.inputs", "ledger.leaks"):
        # Amounts are sums of many terms of either sign.
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-3 * scale)


def test_older_operators_do(captured: Captured):
    """Opset 21 without contrib operators: any runtime can run the file."""
    made = emit(captured("llama"), PRESETS["attnlrp"], Request(seed=lambda output: output))
    executable = OnnxRuntimeBackend(threads=1, opset=21, contrib=False).lower(made.graph)
    inputs = FAMILIES["llama"].inputs()
    want, got = made.graph(**inputs), executable(**inputs)
    key = "relevance.input_ids"
    atol = TOLERANCE * float(want[key].abs().max())
    torch.testing.assert_close(got[key], want[key], rtol=0, atol=atol)
