"""Reading and writing by index: what was read twice gets the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lamella.ir.ops import aten
from lamella.rules.relevance.broadcast import full_like, sum_to
from lamella.rules.relevance.rule import Coefficients, Rule, nothing

Target = Callable[..., Any]


def index(coefficient: Any, output: Any, self: Any, indices: Any) -> Coefficients:
    """Added up where it was read."""
    zeros = full_like(self, 0.0)
    return aten.index_put.default(zeros, list(indices), coefficient, True), None


def index_select(coefficient: Any, output: Any, self: Any, dim: int, index: Any) -> Coefficients:
    """Added up where it was read."""
    axis = int(dim) % max(self.ndim, 1)
    indices = [*[None] * axis, index]
    return aten.index_put.default(full_like(self, 0.0), indices, coefficient, True), None, None


def gather(
    coefficient: Any, output: Any, self: Any, dim: int, index: Any, sparse_grad: bool = False
) -> Coefficients:
    """Added up where it was read."""
    zeros = full_like(self, 0.0)
    found = aten.scatter_add.default(zeros, int(dim) % self.ndim, index, coefficient)
    return found, None, None, None


def index_put(
    coefficient: Any,
    output: Any,
    self: Any,
    indices: Any,
    values: Any,
    accumulate: bool = False,
) -> Coefficients:
    """What was written over gets nothing; what was written gets the entries it is in."""
    found = sum_to(aten.index.Tensor(coefficient, list(indices)), values)
    if accumulate:
        return coefficient, None, found, None
    zero = full_like(values, 0.0)
    return aten.index_put.default(coefficient, list(indices), zero), None, found, None


def scatter(
    coefficient: Any, output: Any, self: Any, dim: int, index: Any, src: Any
) -> Coefficients:
    """As `index_put`, for one entry along an axis; `src` may be a number."""
    kept = aten.scatter.value(coefficient, dim, index, 0.0)
    if not hasattr(src, "shape"):
        return kept, None, None, None
    return kept, None, None, aten.gather.default(coefficient, dim, index)


def scatter_add(
    coefficient: Any, output: Any, self: Any, dim: int, index: Any, src: Any
) -> Coefficients:
    """Both terms of the sum."""
    return coefficient, None, None, aten.gather.default(coefficient, dim, index)


def ordered(coefficient: Any, output: Any, self: Any, *rest: Any) -> Coefficients:
    """`topk` and `sort`: the values go back to their places."""
    places = output[1]
    axis = _axis_of(rest, self.ndim)
    zeros = full_like(self, 0.0)
    found = aten.scatter.src(zeros, axis, places, coefficient[0])
    return (found, *(None,) * len(rest))


def _axis_of(rest: Any, rank: int) -> int:
    """`topk` has its axis behind the count, `sort` first."""
    dim = rest[1] if len(rest) >= 2 and not isinstance(rest[1], bool) else rest[0]
    return int(dim) % max(rank, 1)


INDEXING: Mapping[Target, Rule] = MappingProxyType(
    {
        aten.index.Tensor: index,
        aten.index_select.default: index_select,
        aten.gather.default: gather,
        aten.index_put.default: index_put,
        aten.scatter.src: scatter,
        aten.scatter.value: scatter,
        aten.scatter_add.default: scatter_add,
        aten.topk.default: ordered,
        aten.sort.default: ordered,
        aten.embedding.default: nothing,
        aten.argmax.default: nothing,
        aten.histc.default: nothing,
    }
)
"""Operator -> rule; an embedding is where relevance of integer inputs ends."""
