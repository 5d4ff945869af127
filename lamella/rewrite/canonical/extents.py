"""Sizes with symbols: compared without guards, and as arguments of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.torch_private import statically_known_true

aten = torch.ops.aten

Extent = int | torch.SymInt
LAST = 2**63 - 1
"""How ATen spells "to the end" in a slice."""


def value_of(node: Node) -> Tensor:
    """The fake value of a node that is a tensor."""
    return node.meta["val"]


def shape_of(node: Node) -> tuple[Extent, ...]:
    """The shape of a tensor, with symbols."""
    return tuple(value_of(node).shape)


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a tensor."""
    return value_of(node).dtype


def parts_of(node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Operator, positional and keyword arguments of a call, to make another one like it."""
    return node.target, tuple(node.args), dict(node.kwargs)


def is_tensor(value: Any) -> bool:
    """Whether `value` is a node whose value is one tensor."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def extent_of(argument: Any) -> Extent:
    """The size that an argument stands for: an integer, or a node that computes one."""
    return argument.meta["val"] if isinstance(argument, Node) else argument


def same_extent(one: Extent, two: Extent) -> bool:
    """Whether two sizes are equal for all values of the symbols."""
    if isinstance(one, int) and isinstance(two, int):
        return one == two
    if isinstance(one, int) or isinstance(two, int):
        # A symbol stands for a size that varies.
        return bool(statically_known_true(one == two))
    return one is two or bool(statically_known_true(one == two))


def same_shape(one: Sequence[Extent], two: Sequence[Extent]) -> bool:
    """Whether two shapes are equal for all values of the symbols."""
    return len(one) == len(two) and all(map(same_extent, one, two))


def is_static(shape: Sequence[Extent]) -> bool:
    """Whether a shape has no symbols."""
    return all(isinstance(size, int) for size in shape)


def axis_of(dim: int, ndim: int) -> int:
    """An axis counted from the front."""
    return dim + ndim if dim < 0 else dim


def size_argument(graph: Graph, source: Node, axis: int, before: Node) -> int | Node:
    """The size of `source` along `axis`, as an argument of a node placed before `before`."""
    size = shape_of(source)[axis]
    if isinstance(size, int):
        return size
    return graph.call(aten.sym_size.int, source, axis, before=before)


def size_arguments(
    graph: Graph, shape: Sequence[Extent], sources: Sequence[Node], before: Node
) -> list[int | Node] | None:
    """Arguments that make `shape` in a reshape, with sizes read from `sources`.

    Returns:
        One argument per axis, at most one of them -1; None if more than one size is not that
        of an axis of `sources`.
    """
    arguments: list[int | Node] = []
    for size in shape:
        found = size if isinstance(size, int) else _read(graph, size, sources, before)
        arguments.append(-1 if found is None else found)
    inferred = sum(isinstance(argument, int) and argument == -1 for argument in arguments)
    return arguments if inferred <= 1 else None


def _read(graph: Graph, size: Extent, sources: Sequence[Node], before: Node) -> Node | None:
    for source in sources:
        for axis, known in enumerate(shape_of(source)):
            if not isinstance(known, int) and same_extent(known, size):
                return graph.call(aten.sym_size.int, source, axis, before=before)
    return None
