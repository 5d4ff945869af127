"""Rotary position embedding written out: `lamella.rotary_embedding`."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import (
    axis_of,
    dtype_of,
    is_tensor,
    same_extent,
    same_shape,
    shape_of,
)
from lamella.rewrite.pattern import AnyOf, Call, Match, Pattern, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten
lam = torch.ops.lamella

_X = Var("x")


def _half(which: int) -> Pattern:
    """One half of the last axis of `x`, as a slice or as a part of a split."""
    return AnyOf(
        Call(aten.slice.Tensor, _X, Var("axis"), Var(f"start{which}"), Var(f"stop{which}")),
        Call(
            operator.getitem,
            Call(aten.split_with_sizes.default, _X, Var("sizes"), Var("axis")),
            which,
        ),
    )


def _every_second(which: int) -> Pattern:
    return Call(aten.slice.Tensor, _X, Var("axis"), which, Var(f"stop{which}"), 2)


def _rotated(turned: Pattern) -> Pattern:
    return Call(
        aten.add.Tensor,
        Call(aten.mul.Tensor, _X, Var("cos")),
        Call(aten.mul.Tensor, turned, Var("sin")),
    )


_FIRST, _SECOND = _half(0), _half(1)
_EVEN, _ODD = _every_second(0), _every_second(1)


@rule(_rotated(Call(aten.cat.default, [Call(aten.neg.default, _SECOND), _FIRST], Var("cat_axis"))))
def rotary_of_halves(graph: Graph, found: Match) -> Node | Skip:
    """``x * cos + cat(-x[n/2:], x[:n/2]) * sin -> rotary_embedding(x, cos, sin)``."""
    problem = _not_halves(found)
    if problem:
        return Skip(problem)
    return _rotary(graph, found, (found["cos"], found["sin"]), interleaved=False)


@rule(
    _rotated(
        Call(
            aten.reshape.default,
            Call(aten.stack.default, [Call(aten.neg.default, _ODD), _EVEN], Var("stack_axis")),
            Var("size"),
        )
    )
)
def rotary_of_pairs(graph: Graph, found: Match) -> Node | Skip:
    """``x * cos + stack(-x[1::2], x[::2]) * sin -> rotary_embedding(x, cos, sin, True)``."""
    x = found["x"]
    last = len(shape_of(x)) - 1
    if axis_of(found["axis"], last + 1) != last or found["stack_axis"] not in (-1, last + 1):
        return Skip("the pairs are not along the last axis")
    return _rotary(graph, found, (found["cos"], found["sin"]), interleaved=True)


@rule(
    Call(
        aten.cat.default,
        [
            Call(
                aten.sub.Tensor,
                Call(aten.mul.Tensor, _FIRST, Var("cos")),
                Call(aten.mul.Tensor, _SECOND, Var("sin")),
            ),
            Call(
                aten.add.Tensor,
                Call(aten.mul.Tensor, _SECOND, Var("cos")),
                Call(aten.mul.Tensor, _FIRST, Var("sin")),
            ),
        ],
        Var("cat_axis"),
    )
)
def rotary_of_half_tables(graph: Graph, found: Match) -> Node | Skip:
    """``cat(a cos - b sin, b cos + a sin) -> rotary_embedding(cat(a, b), cat(cos, cos), ..)``."""
    problem = _not_halves(found)
    tables = found["cos"], found["sin"]
    if problem or not all(map(is_tensor, tables)):
        return Skip(problem or "cosine or sine is a number")
    root = found.root
    half = shape_of(root)[-1] // 2
    if not all(same_extent(shape_of(table)[-1], half) for table in tables):
        return Skip("cosine or sine does not have one value per pair")
    whole = tuple(
        graph.call(aten.cat.default, [table, table], len(shape_of(table)) - 1, before=root)
        for table in tables
    )
    return _rotary(graph, found, (whole[0], whole[1]), interleaved=False)


def _not_halves(found: Match) -> str | None:
    """Why what was met are not the two halves of the last axis, or None if they are."""
    x: Node = found["x"]
    last = len(shape_of(x)) - 1
    width = shape_of(x)[last]
    if any(axis_of(found[name], last + 1) != last for name in ("axis", "cat_axis")):
        return "the halves are not along the last axis"
    if not isinstance(width, int) or width % 2:
        return f"the last axis of {x.name} has no halves"
    if found.get("sizes") is not None:
        return None if list(found["sizes"]) == [width // 2, width // 2] else "the parts differ"
    starts = found["start0"], found["start1"]
    stops = found["stop0"], found["stop1"]
    if starts != (0, width // 2) or stops[0] != width // 2 or not _is_end(stops[1], width):
        return "the slices are not the two halves"
    return None


def _is_end(stop: object, width: int) -> bool:
    return isinstance(stop, int) and stop >= width


def _rotary(
    graph: Graph, found: Match, tables: tuple[Node, Node], *, interleaved: bool
) -> Node | Skip:
    x, root = found["x"], found.root
    if not all(is_tensor(table) for table in tables):
        return Skip("cosine or sine is a number")
    if dtype_of(x) != dtype_of(root) or not same_shape(shape_of(x), shape_of(root)):
        return Skip("the result has another shape or dtype than the input")
    if not all(same_extent(shape_of(table)[-1], shape_of(x)[-1]) for table in tables):
        return Skip("cosine or sine does not have one value per channel")
    return graph.call(lam.rotary_embedding.default, x, *tables, interleaved, before=root, like=root)


ROTARY: tuple[Rule, ...] = (rotary_of_halves, rotary_of_pairs, rotary_of_half_tables)
