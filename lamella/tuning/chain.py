"""Small graphs that do nothing but one kernel, many times, each time with other weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Node

from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.signature import Signature
from lamella.ir.torch_private import tree_flatten
from lamella.passes.times import Kernel
from lamella.rewrite.canonicalize import canonicalize

ROUNDED = 8
"""Columns of the products that stand behind a rounding whose time is looked for."""

ROUNDINGS = 4
"""Copies of a rounding, each with an input of its own."""


class MadeUp:
    """Weights whose values don't matter, cut out of one block of memory.

    Times don't depend on the values as long as these are ordinary numbers; making them up anew
    for every weight would take longer than measuring.
    """

    def __init__(self, entries: int = 1 << 24) -> None:
        """A block of random bytes, and one of random numbers."""
        generator = torch.Generator().manual_seed(0)
        self._bytes = torch.randint(0, 256, (entries,), dtype=torch.uint8, generator=generator)
        self._numbers = torch.rand(entries, generator=generator) * 0.02 - 0.01
        self._start = 0

    def codes(self, *shape: int) -> Tensor:
        """uint8."""
        return self._cut(self._bytes, shape)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Small numbers of both signs."""
        return self._cut(self._numbers, shape).to(dtype)

    def _cut(self, block: Tensor, shape: Sequence[int]) -> Tensor:
        count = torch.Size(shape).numel()
        if count > len(block):
            return block.repeat(-(-count // len(block)))[:count].view(*shape)
        if self._start + count > len(block):
            self._start = 0
        start, self._start = self._start, self._start + count
        return block[start : start + count].view(*shape)


def chain(kernel: Kernel, copies: int, made_up: MadeUp) -> Graph:
    """A graph with `copies` of a kernel, one after the other; rows stay dynamic.

    The products read one input. Roundings, which products on one input share, read an input
    each, and a narrow product stands behind every one of them.
    """
    apart = kernel.kind.startswith("rounding")
    count = copies if apart else 1
    graph = _inputs(kernel.inputs, count, kernel.dtype).copy()
    results: list[Node] = []
    for index in range(copies):
        source = graph.inputs[index if apart else 0]
        results.append(_product(graph, source, kernel, made_up, index))
    names = [f"result_{index}" for index in range(copies)]
    graph.set_outputs(results, _signature(graph.signature.inputs, names))
    graph.finish()
    return graph


def _product(graph: Graph, x: Node, kernel: Kernel, made_up: MadeUp, index: int) -> Node:
    inputs, outputs = kernel.inputs, kernel.outputs or ROUNDED
    dtype = getattr(torch, kernel.dtype)

    def weight(name: str, value: Tensor) -> Node:
        return graph.add_weight(f"{name}_{index}", value)

    if kernel.kind == "linear":
        matrix = weight("weight", made_up.numbers(outputs, inputs, dtype=dtype))
        return graph.call(aten.linear.default, x, matrix, None, before=graph.output)
    if kernel.kind == "nbits":
        blocks = -(-inputs // kernel.block)
        packed = weight("packed", made_up.codes(outputs, blocks, kernel.block * kernel.bits // 8))
        scales = weight("scales", made_up.numbers(outputs, blocks, dtype=torch.float16))
        zeros = None
        if not kernel.symmetric:
            zeros = weight("zeros", made_up.codes(outputs, -(-blocks * kernel.bits // 8)))
        args = (x, packed, scales, zeros, None, kernel.bits, kernel.block, True)
        return graph.call(lam.linear_nbits.default, *args, before=graph.output)
    codes = weight("codes", made_up.codes(outputs, inputs).view(torch.int8))
    scales = weight("scales", made_up.numbers(outputs).abs())
    per_row = kernel.kind.endswith("rows")
    return graph.call(lam.linear_int8.default, x, codes, scales, None, per_row, before=graph.output)


@functools.lru_cache(maxsize=32)
def _inputs(features: int, count: int, dtype: str) -> Graph:
    """A graph with `count` (at most `ROUNDINGS`) inputs ``[rows, features]``, nothing done yet."""
    names = [f"x{index}" for index in range(count)]
    values = {name: torch.ones(3, features, dtype=getattr(torch, dtype)) for name in names}
    graph = capture_module(_AddOne(), values)
    canonicalize(graph)
    return graph


class _AddOne(nn.Module):
    def forward(
        self,
        x0: Tensor,
        x1: Tensor | None = None,
        x2: Tensor | None = None,
        x3: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return tuple(value + 1 for value in (x0, x1, x2, x3) if value is not None)


def _signature(inputs: Sequence[str], outputs: Sequence[str]) -> Signature:
    """Of a graph called with one keyword for each input, giving a dict."""
    _, in_spec = tree_flatten(((), dict.fromkeys(inputs, 0)))
    _, out_spec = tree_flatten(dict.fromkeys(outputs, 0))
    return Signature(tuple(inputs), tuple(outputs), in_spec, out_spec)
