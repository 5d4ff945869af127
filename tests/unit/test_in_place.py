"""Results written over dead values: where it is done, and where it must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.in_place import in_place
from lamella.ir.ops import aten
from lamella.rewrite.canonicalize import canonicalize

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def graph_of(function: Callable[..., Any]) -> Graph:
    graph = capture_module(Function(function).eval(), {"x": X}, dynamic=False)
    canonicalize(graph)
    return graph


def written(graph: Graph) -> int:
    """How many results take over memory."""
    names = ("out", "grad_input")
    return sum(any(name in node.kwargs for name in names) for node in in_place(graph).graph.nodes)


CASES: dict[str, tuple[Callable[..., Any], int]] = {
    "a chain": (lambda x, w: ((x @ w).tanh() * 2 + 1).sigmoid(), 4),
    "an input stays": (lambda x, w: (x * 2) + 1, 1),
    "a weight stays": (lambda x, w: w * 2, 0),
    "read again later": (lambda x, w: (lambda h: h.tanh() + h)(x @ w), 1),
    "an output stays": (lambda x, w: (lambda h: (h, h * 2))(x @ w), 0),
    "a view is read later": (lambda x, w: (lambda h: (h * 2, h.reshape(-1)[1:]))(x @ w), 0),
    "a view is read beside": (lambda x, w: (lambda h: h * h.transpose(0, 1))(w @ w), 0),
    "twice the same": (lambda x, w: (lambda h: h * h)(x @ w), 1),
    "broadcast": (lambda x, w: (x @ w).sum(1, keepdim=True) * (x @ w), 1),
    "an expanded value": (lambda x, w: (x @ w).sum(1, keepdim=True).expand(4, 6) * 2, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_only_dead_memory_is_written(case: str):
    function, count = CASES[case]
    graph = graph_of(function)
    assert written(graph) == count
    before = X.clone()
    want, got = graph.run([X]), in_place(graph)(X)
    for one, other in zip(want, got, strict=True):
        # Kernels cut their loops by the alignment of memory.
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)
    assert torch.equal(before, X)
    assert torch.equal(graph.run([X])[0], want[0])


def test_the_graph_is_left_as_it_is():
    graph = graph_of(CASES["a chain"][0])
    text, edits = str(graph), graph.edits
    in_place(graph)(X)
    assert str(graph) == text
    assert graph.edits == edits
    assert aten.mul.Tensor in {node.target for node in graph.nodes}
