"""Row by row operators on flattened rows: the leading axes stay as they are.

Some models flatten ``[batch, sequence, channels]`` to ``[tokens, channels]`` around linear layers
or whole branches. The flattening moves behind the operators until it meets its inverse, so that
the residual stream keeps one shape.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import (
    is_tensor,
    parts_of,
    same_extent,
    same_shape,
    shape_of,
)
from lamella.rewrite.pattern import Call, Match, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten

_ROWWISE = (
    aten.linear.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.relu.default,
    aten.silu.default,
    aten.gelu.default,
    aten.tanh.default,
)

_FLAT_X = Call(aten.reshape.default, Var("x"), Var("size"))
_FLAT_Y = Call(aten.reshape.default, Var("y"), Var("size_y"))


@rule(Call(_ROWWISE, _FLAT_X, ...))
def rowwise_of_flat_rows(graph: Graph, found: Match) -> Node | Skip:
    """``f(reshape(x, [-1, n])) -> reshape(f(x), [-1, m])``, where `f` acts on rows."""
    root, x = found.root, found["x"]
    problem = _not_flat_rows(x, found.nodes[1])
    if problem:
        return Skip(problem)
    target, (_, *rest), kwargs = parts_of(root)
    made = graph.call(target, x, *rest, before=root, **kwargs)
    size = [-1, shape_of(root)[-1]]
    return graph.call(aten.reshape.default, made, size, before=root, like=root)


_BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor)


@rule(Call(_BINARY, _FLAT_X, _FLAT_Y))
def sum_of_flat_rows(graph: Graph, found: Match) -> Node | Skip:
    """``reshape(x, [-1, n]) + reshape(y, [-1, n]) -> reshape(x + y, [-1, n])``; so for ``*``."""
    root, x, y = found.root, found["x"], found["y"]
    flat_x, flat_y = found.nodes[1:3]
    problem = _not_flat_rows(x, flat_x) or _not_flat_rows(y, flat_y)
    if problem or not same_shape(shape_of(x), shape_of(y)):
        return Skip(problem or "the operands had different leading axes")
    target, *_ = parts_of(root)
    made = graph.call(target, x, y, before=root)
    size = [-1, shape_of(root)[-1]]
    return graph.call(aten.reshape.default, made, size, before=root, like=root)


@rule(Call(_BINARY, _FLAT_X, Var("y")))
def flat_rows_and_channels(graph: Graph, found: Match) -> Node | Skip:
    """``reshape(x, [-1, n]) + y -> reshape(x + y, [-1, n])``, for one `y` per channel."""
    root, x, y = found.root, found["x"], found["y"]
    problem = _not_flat_rows(x, found.nodes[1])
    if problem or (isinstance(y, Node) and not (is_tensor(y) and len(shape_of(y)) <= 1)):
        return Skip(problem or f"{y.name} is no vector")
    target, *_ = parts_of(root)
    made = graph.call(target, x, y, before=root)
    size = [-1, shape_of(root)[-1]]
    return graph.call(aten.reshape.default, made, size, before=root, like=root)


def _not_flat_rows(x: Node, flat: Node) -> str | None:
    """Why `flat` is not `x` with its leading axes made one, or None if it is."""
    if not is_tensor(x) or len(shape_of(flat)) != 2 or len(shape_of(x)) < 3:
        return f"{flat.name} does not flatten rows"
    columns = shape_of(flat)[-1]
    if not isinstance(columns, int) or not same_extent(shape_of(x)[-1], columns):
        return f"{flat.name} changes the last axis"
    return None


ROWS: tuple[Rule, ...] = (
    rowwise_of_flat_rows,
    sum_of_flat_rows,
    flat_rows_and_channels,
)
