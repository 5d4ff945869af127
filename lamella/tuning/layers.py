"""Graphs of one layer in a format, with made-up codes: to be tried and timed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lamella.backends.formats import QuantFormat, Role
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.integer_operators import static_range
from lamella.ir.ops import aten, lam
from lamella.ir.packing import pack
from lamella.rewrite.canonicalize import canonicalize

Shape = tuple[int, int]
"""Outputs and inputs: of a matrix, of a table (rows and columns), or channels of a convolution."""

IMAGE = 28
"""Height and width of the images that a convolution sees."""

_RANGE = 4.0
"""Numbers that are normally distributed lie in this range of both signs."""


def layer(format: QuantFormat, shape: Shape) -> Graph:
    """A graph of one layer in a format."""
    graph = _empty(format.role, shape).copy()
    (x,) = graph.inputs
    made = _MadeUp(graph, shape)
    if format.role == "embedding":
        node = _looked_up(made, format)
    elif format.role == "convolution":
        node = graph.call(format.operator, x, *_convolution(made, format), before=graph.output)
    else:
        node = graph.call(format.operator, x, *_linear(made, format), before=graph.output)
    graph.set_outputs([node], graph.signature)
    graph.finish()
    return graph


def sample(role: Role, shape: Shape, rows: int) -> Tensor:
    """An input of such a layer; of images there are at most 3."""
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(rows)
    if role == "embedding":
        return torch.randint(0, outputs, (rows,), generator=generator)
    if role == "convolution":
        return torch.randn(min(rows, 3), inputs, IMAGE, IMAGE, generator=generator)
    return torch.randn(rows, inputs, generator=generator)


class _MadeUp:
    """Weights of a graph; the same for the same shape."""

    def __init__(self, graph: Graph, shape: Shape) -> None:
        self.graph = graph
        self.outputs, self.inputs = shape
        self.generator = torch.Generator().manual_seed(sum(shape))

    def add(self, name: str, value: Tensor) -> Any:
        return self.graph.add_weight(name, value)

    def integers(self, *shape: int, top: int) -> Tensor:
        return torch.randint(0, top, shape, generator=self.generator)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator) / shape[1] ** 0.5

    def scales(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) * 0.01 + 0.001

    def blocks(self, format: QuantFormat) -> list[Any]:
        """Codes, scales and zeros."""
        blocks, top = -(-self.inputs // format.block), 1 << format.bits
        codes = self.integers(self.outputs, blocks, format.block, top=top)
        scales = self.scales(self.outputs, blocks).to(format.scales or torch.float16)
        zeros = None
        if not format.symmetric:
            zeros = pack(self.integers(self.outputs, blocks, top=top), format.bits)
        held = None if zeros is None else self.add("zeros", zeros)
        return [self.add("packed", pack(codes, format.bits)), self.add("scales", scales), held]


def _linear(made: _MadeUp, format: QuantFormat) -> list[Any]:
    """What a linear layer takes behind its input."""
    if format.bits >= 16:
        return [made.add("weight", made.floats(made.outputs, made.inputs)), None]
    if format.block:
        rest = (None, format.bits, format.block, format.activations != "same")
        return [*made.blocks(format), *rest]
    codes = (made.integers(made.outputs, made.inputs, top=255) - 127).to(torch.int8)
    held = [made.add("codes", codes), made.add("scales", made.scales(made.outputs)), None]
    if format.activations == "int8-static":
        return [*held, *static_range(-_RANGE, _RANGE)]
    return [*held, format.activations == "int8-row"]


def _convolution(made: _MadeUp, format: QuantFormat) -> list[Any]:
    """What a convolution of 3 x 3 takes behind its input."""
    steps = [[1, 1], [1, 1], [1, 1], 1]
    shape = (made.outputs, made.inputs, 3, 3)
    if format.bits == 32:
        return [made.add("weight", made.floats(*shape) / 3), None, *steps]
    codes = (made.integers(*shape, top=255) - 127).to(torch.int8)
    # A sum of so many products of codes has about the deviation of one input.
    deviation = 74 * (9 * made.inputs) ** 0.5
    scales = torch.full((made.outputs,), 1 / deviation)
    held = [made.add("codes", codes), made.add("scales", scales), None]
    return [*held, *steps, *static_range(-_RANGE, _RANGE), *static_range(-_RANGE, _RANGE)]


def _looked_up(made: _MadeUp, format: QuantFormat) -> Any:
    graph = made.graph
    (ids,) = graph.inputs
    if format.bits == 32:
        table = made.add("weight", made.floats(made.outputs, made.inputs))
        return graph.call(aten.embedding.default, table, ids, before=graph.output)
    rest = (ids, format.bits, format.block, made.inputs)
    target = lam.embedding_nbits.default
    rows = graph.call(target, *made.blocks(format), *rest, before=graph.output)
    return graph.call(aten.to.dtype, rows, torch.float32, before=graph.output)


class _Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@functools.lru_cache(maxsize=16)
def _empty(role: Role, shape: Shape) -> Graph:
    """A graph with the input of a layer, nothing done with it yet."""
    graph = capture_module(_Same(), (sample(role, shape, 3),))
    canonicalize(graph)
    return graph
