"""Inputs to check a graph with: samples that fit it, or inputs made up from its placeholders.

Probe inputs are drawn from a seed: token ids below the size of the embedding they index, masks
of ones, normal floats. Sizes are chosen for each symbol of the input shapes; what the graph does
not run on (a position past its table, fewer pixels than its kernel) is not used.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from lamella.data import Batch, Samples
from lamella.errors import GraphError, PassError, SamplesError
from lamella.ir import ops
from lamella.ir.axes import merged_batch, sizes_with
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.symbols import shape_of

logger = logging.getLogger(__name__)

Floats = Literal["normal", "counts"]

_TABLES: dict[Any, str] = {
    aten.embedding.default: "weight",
    lam.embedding_nbits.default: "packed",
}


@dataclass(frozen=True)
class _Shape:
    """One choice of sizes, of how floats are drawn, and whether the last row is padded."""

    sizes: Mapping[sympy.Symbol, int]
    floats: Floats
    padded: bool


def probe_samples(graph: Graph, *, count: int = 2, seed: int = 0) -> Samples:
    """Made-up inputs of different sizes that `graph` runs on and gives finite outputs for.

    Args:
        graph: The graph; its weights must have data.
        count: How many batches at most, each of other sizes.
        seed: Of the generator that all values are drawn from.

    Raises:
        GraphError: A weight has no data.
        PassError: The graph runs on none of the sizes; the message holds the last failure.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[Batch] = []
    tried: set[tuple[int, ...]] = set()
    failure = "it gives NaN or Inf"
    for shape in _shapes(graph):
        key = tuple(shape.sizes.values())
        if key in tried:
            continue
        batch = _draw(graph, shape, generator)
        try:
            fits = _is_finite(graph.run(batch.values()))
        except GraphError:
            raise
        except Exception as error:
            logger.debug("probe sizes %s don't fit: %s", key, error)
            failure, fits = f"{type(error).__name__}: {error}", False
        if fits:
            tried.add(key)
            found.append(batch)
        if len(found) == count:
            break
    if not found:
        raise PassError(
            f"the graph can't be checked on made-up inputs ({failure.splitlines()[0]}); "
            f"pass samples="
        )
    return Samples(tuple(found), seed)


def check_samples(samples: Samples, graph: Graph) -> None:
    """Check every batch against the inputs of `graph`: names, dtypes, axes, sizes.

    Raises:
        SamplesError: A batch doesn't fit; the message names it and the input.
    """
    for index, batch in enumerate(samples):
        try:
            values = graph.signature.flatten((), batch)
        except SamplesError as error:
            raise SamplesError(f"sample {index}: {error}") from None
        known: dict[sympy.Symbol, tuple[int, str]] = {}
        for name, node, value in zip(graph.signature.inputs, graph.inputs, values, strict=True):
            wrong = _mismatch(node, value, known, name)
            if wrong:
                raise SamplesError(f"input {name!r} of sample {index} {wrong}")


def flat_inputs(graph: Graph, batch: Batch) -> list[Any]:
    """The flat inputs of a batch, in the order of the placeholders."""
    return graph.signature.flatten((), batch)


# ---- checking ----------------------------------------------------------------------------


def _mismatch(node: Node, value: Any, known: dict[sympy.Symbol, tuple[int, str]], name: str) -> str:
    """What is wrong with a value, or nothing; sizes of symbols are remembered in `known`."""
    expected = _val(node)
    if not isinstance(expected, Tensor):
        return ""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, the model takes a tensor"
    if value.dtype != expected.dtype:
        return f"is {value.dtype}, the model takes {expected.dtype}"
    if value.ndim != expected.ndim:
        return f"has {value.ndim} axes ({list(value.shape)}), the model takes {expected.ndim}"
    for axis, (size, wanted) in enumerate(zip(value.shape, shape_of(node), strict=True)):
        if isinstance(wanted, int) and size != wanted:
            return f"has size {size} on axis {axis}, the model takes {wanted}"
        if isinstance(wanted, sympy.Symbol):
            before, where = known.setdefault(wanted, (size, name))
            if before != size:
                return f"has size {size} on axis {axis}, but {where!r} has {before} there"
    return ""


def _is_finite(outputs: tuple[Any, ...]) -> bool:
    floats = [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]
    return all(bool(torch.isfinite(value).all()) for value in floats)


# ---- sizes -------------------------------------------------------------------------------


def _shapes(graph: Graph) -> Iterator[_Shape]:
    """Choices of sizes, small ones first; batch 2 and 3, sequence 7 and 12."""
    merged = merged_batch(graph)
    sizes = [size for node in graph.inputs for size in sizes_with(node, merged)]
    symbols = sorted({symbol for size in sizes for symbol in _free(size)}, key=str)
    batches = {sizes_with(node, merged)[0] for node in graph.inputs if shape_of(node)}
    hints = _hints(graph)
    modes: tuple[Floats, ...] = ("normal", "counts")
    for floats in modes:
        # Lengths that need not agree differ, then they agree, then they are those of the capture.
        for batch, length, step in ((2, 7, 2), (3, 12, -2), (2, 7, 0), (3, 12, 0)):
            steps = itertools.count(0, step)
            chosen = {s: batch if s in batches else length + next(steps) for s in symbols}
            yield _Shape(_spread(chosen, merged), floats, batch == 3)
        yield _Shape({s: 2 if s in batches else hints[s] for s in hints}, floats, False)
        longer = {s: 3 if s in batches else hints[s] + hints[s] // 2 for s in hints}
        yield _Shape(longer, floats, False)
        yield _Shape(hints, floats, False)


def _spread(
    chosen: Mapping[sympy.Symbol, int], merged: Mapping[sympy.Symbol, sympy.Symbol]
) -> dict[sympy.Symbol, int]:
    """The sizes of merged symbols are those of what they were merged into."""
    return {**chosen, **{symbol: chosen[root] for symbol, root in merged.items()}}


def _free(size: sympy.Expr) -> set[sympy.Symbol]:
    symbols: Any = size.free_symbols
    return set(symbols)


def _hints(graph: Graph) -> dict[sympy.Symbol, int]:
    """The sizes that the model was captured with."""
    hints: dict[sympy.Symbol, int] = {}
    for node in graph.inputs:
        value = _val(node)
        shape: Any = value.shape if isinstance(value, Tensor) else ()
        for size, wanted in zip(shape, shape_of(node), strict=True):
            if isinstance(wanted, sympy.Symbol) and size.node.has_hint():
                hints[wanted] = int(size.node.hint)
    return hints


def _val(node: Node) -> Any:
    return node.meta.get("val")


# ---- values ------------------------------------------------------------------------------


def _draw(graph: Graph, shape: _Shape, generator: torch.Generator) -> dict[str, Any]:
    """Inputs of the given sizes by name, in the order of the placeholders."""
    drawn: dict[str, Any] = {}
    for name, node in zip(graph.signature.inputs, graph.inputs, strict=True):
        value = _val(node)
        if isinstance(value, Tensor):
            sizes = [_number(size, shape.sizes) for size in shape_of(node)]
            drawn[name] = _values(node, name, sizes, shape, generator)
        else:
            drawn[name] = value
    return drawn


def _number(size: sympy.Expr | int, sizes: Mapping[sympy.Symbol, int]) -> int:
    if isinstance(size, int):
        return size
    number: Any = size.xreplace({symbol: sympy.Integer(n) for symbol, n in sizes.items()})
    return int(number)


def _values(
    node: Node, name: str, sizes: list[int], shape: _Shape, generator: torch.Generator
) -> Tensor:
    dtype = _val(node).dtype
    if dtype == torch.bool or "mask" in name:
        mask = torch.ones(sizes, dtype=dtype)
        if shape.padded and name.endswith("attention_mask") and len(sizes) == 2:
            mask[-1, max(1, sizes[1] - 2) :] = 0
        return mask
    if dtype.is_floating_point:
        if shape.floats == "counts":
            return torch.randint(1, 4, sizes, generator=generator).to(dtype)
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.randint(0, _vocabulary(node), sizes, generator=generator).to(dtype)


def _vocabulary(node: Node) -> int:
    """Rows of the smallest table that the values of `node` index; 2 if there is none."""
    rows: list[int] = []
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        for user in current.users:
            if user.target in _TABLES:
                bound = ops.bind(user)
                if bound["indices"] is current:
                    rows.append(int(_val(bound[_TABLES[user.target]]).shape[0]))
            facts = ops.facts(user.target)
            if (facts is None or facts.category in ("view", "cast")) and user not in seen:
                seen.add(user)
                waiting.append(user)
    return min(rows, default=2)
