"""Graphs of small functions, as a model would have them, for the tests of `lamella.rewrite`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lamella.ir import ops
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.rewrite.canonicalize import Canonicalization, canonicalize, noncanonical


class Written(nn.Module):
    """A function of up to four tensors, with weights under their names."""

    def __init__(self, function: Callable[..., Any], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, value in weights.items():
            self.register_buffer(name, value)

    def forward(self, a: Any = None, b: Any = None, c: Any = None, d: Any = None) -> Any:
        given = [value for value in (a, b, c, d) if value is not None]
        return self.function(*given, **dict(self.named_buffers()))


def graph_of(
    function: Callable[..., Any], *inputs: Tensor, dynamic: Any = True, **weights: Tensor
) -> Graph:
    """The graph of ``function(*inputs, **weights)``, as it is captured."""
    named = dict(zip("abcd", inputs, strict=False))
    return capture_module(Written(function, weights), named, dynamic=dynamic)


def canonical(
    function: Callable[..., Any], *inputs: Tensor, dynamic: Any = True, **weights: Tensor
) -> tuple[Graph, Canonicalization]:
    """The canonical graph of a function, checked: same values, canonical, nothing left to do."""
    graph = graph_of(function, *inputs, dynamic=dynamic, **weights)
    report = canonicalize(graph)
    assert noncanonical(graph) == {}
    copies = [value.clone() for value in inputs]
    expected = function(*copies, **{name: value.clone() for name, value in weights.items()})
    assert_equal(run(graph, *inputs), expected)
    check_values(graph)
    text, again = graph.module.code, canonicalize(graph)
    assert not any(again.counts.values()), again.counts
    assert graph.module.code == text
    return graph, report


def run(graph: Graph, *inputs: Tensor) -> Any:
    """Call the graph on copies, in case it writes into its inputs."""
    return graph(**dict(zip("abcd", [value.clone() for value in inputs], strict=False)))


def assert_equal(got: Any, expected: Any) -> None:
    """Equal up to the rounding of float64 (sums of a hundred terms) or of float32."""
    pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]
    for one, two in pairs:
        tolerance = 1e-12 if two.dtype == torch.float64 else 2e-6
        if two.dtype in (torch.float16, torch.bfloat16):
            tolerance = 1e-2
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, equal_nan=True)


def check_values(graph: Graph) -> None:
    """Every fake value is what the operator gives: rank, dtype, and sizes without symbols."""
    twin = graph.copy()
    twin.refresh()
    for node, again in zip(graph.nodes, twin.nodes, strict=True):
        kept, fresh = node.meta.get("val"), again.meta.get("val")
        if isinstance(kept, Tensor):
            assert kept.dtype == fresh.dtype, node.name
            assert len(kept.shape) == len(fresh.shape), node.name
            for one, two in zip(kept.shape, fresh.shape, strict=True):
                assert str(one) == str(two) or not isinstance(one, int), node.name


def operators(graph: Graph) -> dict[str, int]:
    """Short name of every operator -> how often it occurs."""
    names = [ops.op_name(node.target) for node in graph.nodes if node.op == "call_function"]
    return dict(Counter(name.split(".")[1] for name in names))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
