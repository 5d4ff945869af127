"""Proof by example that a graph with a cache computes what the whole graph computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import IncrementalError
from lamella.ir.cache import CacheLayout
from lamella.ir.graph import Graph
from lamella.ir.symbols import shape_of, size_of

aten = torch.ops.aten
_CHUNKS = (4, 1, 2)
_TOLERANCE = 1e-3
"""Of the largest logit: far above rounding in float32, far below an operation gone wrong."""
_COARSE = 5e-2
"""The same for a graph that rounds activations or computes in 16 bits."""


def check_steps(graph: Graph, step: Graph, once: Graph | None) -> None:
    """Compare the whole graph on a few tokens with the steps that read them in chunks.

    Graphs whose weights are not in memory are not checked.

    Raises:
        IncrementalError: They differ: an operation mixes tokens in a way no rule covers.
    """
    if not all(graph.is_loaded(node) for node in graph.weight_nodes()):
        return
    layout = step.cache
    assert layout is not None
    given = _examples(graph, layout)
    wanted = graph.signature.outputs.index(layout.logits)
    whole = graph.run([given[name] for name in graph.signature.inputs])[wanted]
    made: Mapping[str, Tensor] = {} if once is None else _run(once, given)
    got = _in_chunks(step, layout, {**given, **made})
    scale, apart = whole.abs().max(), (whole - got).abs().max()
    if not bool(apart <= scale * (_COARSE if _rounds(graph) else _TOLERANCE)):
        raise IncrementalError(
            f"read in chunks of {', '.join(map(str, _CHUNKS))} tokens the model gives logits that "
            f"are off by {float(apart / scale):.2g} of the largest: some operation mixes tokens in "
            f"a way that no rule covers"
        )


def _in_chunks(step: Graph, layout: CacheLayout, given: Mapping[str, Any]) -> Tensor:
    cache = {slot.input: _empty(slot.shape, slot.dtype) for slot in layout.slots}
    logits: list[Tensor] = []
    past = 0
    for new in _CHUNKS:
        until = past + new
        feeds = {**given, **cache, layout.tokens: given[layout.tokens][:, past:until]}
        feeds[layout.mask] = torch.ones(2, until, dtype=torch.int64)
        if layout.positions is not None:
            feeds[layout.positions] = torch.arange(past, until).expand(2, -1)
        results = _run(step, feeds)
        cache = {slot.input: results[slot.output] for slot in layout.slots}
        logits.append(results[layout.logits])
        past = until
    return torch.cat(logits, dim=1)


def _run(graph: Graph, given: Mapping[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        values = graph.run([given[name] for name in graph.signature.inputs])
    return dict(zip(graph.signature.outputs, values, strict=True))


def _empty(shape: tuple[int, ...], dtype: str) -> Tensor:
    sizes = [0 if size == -1 else size for size in shape]
    return torch.zeros(2, *sizes, dtype=getattr(torch, dtype))


def _examples(graph: Graph, layout: CacheLayout) -> dict[str, Any]:
    """Two samples, with as many tokens as the chunks have together."""
    generator = torch.Generator().manual_seed(0)
    placed = dict(zip(graph.signature.inputs, graph.inputs, strict=True))
    length = shape_of(placed[layout.tokens])[1]
    return {name: _example(node, length, generator) for name, node in placed.items()}


def _example(node: Node, length: Any, generator: torch.Generator) -> Any:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return value
    sizes = [_size(axis, size, length) for axis, size in enumerate(value.shape)]
    if value.is_floating_point():
        return torch.randn(sizes, generator=generator).to(value.dtype)
    readers = [user for user in node.users if user.target is aten.embedding.default]
    if not readers or str(node.target).endswith("position_ids"):
        counted = torch.arange(sizes[-1]).expand(sizes).clone()
        positions = str(node.target).endswith("position_ids")
        return counted if positions else torch.ones(sizes, dtype=value.dtype)
    rows = int(readers[0].args[0].meta["val"].shape[0])  # pyright: ignore
    return torch.randint(1, rows, sizes, generator=generator, dtype=value.dtype)


def _size(axis: int, size: Any, length: Any) -> int:
    expression = size_of(size)
    if isinstance(expression, int):
        return expression
    if expression == length:
        return sum(_CHUNKS)
    return 2 if axis == 0 else int(size.node.hint)


def _rounds(graph: Graph) -> bool:
    """Whether small differences grow: activations are rounded, or computed in 16 bits."""
    halves = (torch.float16, torch.bfloat16)
    values = [node.meta.get("val") for node in graph.nodes]
    if any(isinstance(v, Tensor) and v.dtype in halves for v in values):
        return True
    lam = torch.ops.lamella
    return bool(graph.find(lam.linear_nbits.default) or graph.find(lam.round_uniform.default))
