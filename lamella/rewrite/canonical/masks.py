"""Attention masks: what every model computes in its own way becomes as small as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import (
    axis_of,
    dtype_of,
    is_tensor,
    parts_of,
    same_extent,
    same_shape,
    shape_of,
    size_arguments,
)
from lamella.rewrite.pattern import AnyOf, Call, Match, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default
_SHAPES = frozenset({aten.unsqueeze.default, aten.expand.default, aten.reshape.default})


@rule(Call(aten.index.Tensor, Var("x"), Var("indices")))
def index_by_ranges(graph: Graph, found: Match) -> Node | Skip:
    """``x[arange(m)[:, None], arange(n)[None, :]] -> x[:m, :n]``, with axes of size 1 between."""
    root, x, indices = found.root, found["x"], found["indices"]
    if len(indices) != len(shape_of(x)):
        return Skip("not every axis is indexed")
    ndim = len(shape_of(root))
    places = [_range_along(index, ndim) for index in indices]
    if any(place is None for place in places):
        return Skip("an index is no range from 0 along one axis")
    axes = [axis for axis, _ in places if axis is not None]  # type: ignore[misc]
    if axes != sorted(set(axes)):
        return Skip("the ranges are not along axes in order")
    made = x
    for axis, place in enumerate(places):
        assert place is not None
        made = graph.call(aten.slice.Tensor, made, axis, 0, place[1], before=root)
    for axis in range(ndim):
        if axis not in axes:
            made = graph.call(aten.unsqueeze.default, made, axis, before=root)
    return made


def _range_along(index: Any, ndim: int) -> tuple[int, Any] | None:
    """The axis of the result and the end of an index ``arange(0, end)``, or None."""
    if not is_tensor(index):
        return None
    shape = shape_of(index)
    long = [axis for axis, size in enumerate(shape) if not (isinstance(size, int) and size == 1)]
    source = _without_shapes(index)
    if len(long) != 1 or source.target is not aten.arange.start_step:
        return None
    start, end, step = source.args
    if (start, step) != (0, 1) or not same_extent(shape_of(source)[0], shape[long[0]]):
        return None
    return long[0] + ndim - len(shape), end


def _without_shapes(node: Node) -> Node:
    while node.target in _SHAPES:
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


@rule(Call(aten.ge.Scalar, Var("x"), 0))
def range_is_not_negative(graph: Graph, found: Match) -> Node | Skip:
    """``arange(0, n) >= 0 -> full(True)``."""
    root, x = found.root, found["x"]
    source = _without_shapes(x)
    if source.target is not aten.arange.start_step:
        return Skip("it is no range")
    start, _, step = source.args
    if not isinstance(start, int) or start < 0 or not isinstance(step, int) or step < 0:
        return Skip("the range may hold negative numbers")
    size = size_arguments(graph, shape_of(root), [x], root)
    assert size is not None  # every size is one of `x`
    return graph.call(aten.full.default, size, True, dtype=torch.bool, before=root, like=root)


_TRUE = Call(aten.full.default, Var("size"), True, ...)
_FALSE = Call(aten.full.default, Var("size"), False, ...)


@rule(
    AnyOf(
        Call(aten.logical_and.default, Var("x"), _TRUE),
        Call(aten.logical_or.default, Var("x"), _FALSE),
    )
)
def neutral_condition(graph: Graph, found: Match) -> Node | Skip:
    """``x & True -> x`` and ``x | False -> x``, expanded where the constant is larger."""
    x, root = found["x"], found.root
    if not is_tensor(x) or dtype_of(x) != torch.bool:
        return Skip("the operand is not boolean")
    if same_shape(shape_of(x), shape_of(root)):
        return x
    sources = [node for node in root.args if isinstance(node, Node)]
    size = size_arguments(graph, shape_of(root), sources, root)
    if size is None:
        return Skip("a size of the result is none of the operands'")
    return graph.call(aten.expand.default, x, size, before=root, like=root)


@rule(
    Call(
        aten.unsqueeze.default,
        Call(aten.full.default, Var("size"), Var("value"), ...),
        Var("dim"),
    )
)
def unsqueeze_of_full(graph: Graph, found: Match) -> Node:
    """``unsqueeze(full(size, value), dim) -> full(size with a 1, value)``."""
    root, size = found.root, list(found["size"])
    size.insert(axis_of(found["dim"], len(size) + 1), 1)
    dtype = dtype_of(root)
    return graph.call(aten.full.default, size, found["value"], dtype=dtype, before=root, like=root)


@rule(Call(aten.expand.default, Call(aten.full.default, Var("size"), Var("value"), ...), ...))
def expand_of_full(graph: Graph, found: Match) -> Node:
    """``expand(full(a, value), b) -> full(b, value)``."""
    root, value = found.root, found["value"]
    inner = found.nodes[1]
    wanted: Any = root.args[1]
    kept = [*([None] * (len(wanted) - len(found["size"]))), *found["size"]]
    size = [old if new == -1 else new for old, new in zip(kept, wanted, strict=True)]
    return graph.call(aten.full.default, size, value, dtype=dtype_of(inner), before=root, like=root)


@rule(
    Call(
        _SDPA,
        Var("q"),
        Var("k"),
        Var("v"),
        Call(aten.expand.default, Var("mask"), Var("size"), ...),
        ...,
    )
)
def attention_with_expanded_mask(graph: Graph, found: Match) -> Node | Skip:
    """``sdpa(q, k, v, expand(mask)) -> sdpa(q, k, v, mask)``: attention broadcasts its mask."""
    root, mask = found.root, found["mask"]
    if not is_tensor(mask) or len(shape_of(mask)) < 2:
        return Skip("the mask has no axis for queries and keys")
    _, (q, k, v, _, *rest), kwargs = parts_of(root)
    return graph.call(_SDPA, q, k, v, mask, *rest, before=root, like=root, **kwargs)


@rule(Call(_SDPA, Var("q"), Var("k"), Var("v"), _TRUE, ...))
def attention_to_everything(graph: Graph, found: Match) -> Node:
    """``sdpa(q, k, v, True) -> sdpa(q, k, v, None)``: a mask that hides nothing."""
    root = found.root
    _, (q, k, v, _, *rest), kwargs = parts_of(root)
    return graph.call(_SDPA, q, k, v, None, *rest, before=root, like=root, **kwargs)


MASKS: tuple[Rule, ...] = (
    index_by_ranges,
    range_is_not_negative,
    neutral_condition,
    unsqueeze_of_full,
    expand_of_full,
    attention_with_expanded_mask,
    attention_to_everything,
)
