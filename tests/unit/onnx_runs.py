"""Write a function of tensors to ONNX, run it, and give both results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from lamella.backends.onnxruntime.files import MODEL, Scratch, save_model
from lamella.backends.onnxruntime.session import Session
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph

Function = Callable[..., Any]
Dynamic = bool | Mapping[str, Sequence[int]]


class Calls(nn.Module):
    """A module that calls a function; `weights` are its buffers, passed first."""

    def __init__(self, function: Function, weights: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.function = function
        self.count = len(weights)
        for index, weight in enumerate(weights):
            self.register_buffer(f"w{index}", weight)

    def forward(self, x: Tensor, y: Any = None, z: Any = None, u: Any = None) -> Any:
        given = [value for value in (x, y, z, u) if value is not None]
        return self.function(*(getattr(self, f"w{i}") for i in range(self.count)), *given)


def graph_of(
    function: Function,
    *inputs: Tensor,
    weights: Sequence[Tensor] = (),
    dynamic: Dynamic = True,
) -> Graph:
    """The graph of a function, not canonicalized: it holds the operators that were called."""
    named = dict(zip("xyzu", inputs, strict=False))
    graph = capture_module(Calls(function, weights), named, dynamic=dynamic)
    graph.finish()
    return graph


def run_onnx(
    graph: Graph, inputs: Sequence[Tensor], *, opset: int = 23, contrib: bool = True
) -> list[Tensor]:
    """The flat outputs of the graph from ONNX Runtime, after the checker of ONNX passed it."""
    model = write_onnx(graph, opset=opset, contrib=contrib)
    scratch = Scratch()
    save_model(model, scratch.path)
    check(scratch.path / MODEL, model)
    session = Session(scratch.path / MODEL, threads=1)
    feeds = dict(zip(graph.signature.inputs, inputs, strict=True))
    feeds = {name: value for name, value in feeds.items() if name in session.inputs}
    return session.run(feeds, session.outputs)


def check(path: Path, model: ir.Model) -> None:
    """Run ONNX's checker; it knows the standard operators only."""
    if set(model.opset_imports) == {""}:
        onnx.checker.check_model(str(path), full_check=True)


def op_types(graph: Graph, **options: Any) -> list[str]:
    """The ONNX operators of the written graph, in order."""
    return [node.op_type for node in write_onnx(graph, **options).graph]


def assert_same(
    function: Function,
    *inputs: Tensor,
    others: Sequence[Sequence[Tensor]] = (),
    weights: Sequence[Tensor] = (),
    opset: int = 23,
    dynamic: Dynamic = True,
) -> None:
    """ONNX Runtime gives what PyTorch gives, for `inputs` and for other sizes.

    Floats may differ by 2e-5 of the largest entry: both compute in float32 and order sums and
    approximate functions in their own way. Everything else is equal.
    """
    graph = graph_of(function, *inputs, weights=weights, dynamic=dynamic)
    for values in (inputs, *others):
        with torch.no_grad():
            expected = Calls(function, weights)(*values)
        expected = list(expected) if isinstance(expected, tuple | list) else [expected]
        for want, got in zip(expected, run_onnx(graph, values, opset=opset), strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            if want.dtype.is_floating_point and want.numel():
                finite = want[want.isfinite()]
                scale = float(finite.abs().max()) if finite.numel() else 1.0
                torch.testing.assert_close(
                    got, want, rtol=0, atol=2e-5 * max(scale, 1e-3), equal_nan=True
                )
            else:
                assert torch.equal(got, want)
