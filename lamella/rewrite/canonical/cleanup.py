"""Operators that change nothing go away; one spelling of every cast."""

from __future__ import annotations

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import dtype_of, is_tensor, same_shape, shape_of
from lamella.rewrite.pattern import AnyOf, Call, Match, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten


@rule(
    Call(
        (
            aten.alias.default,
            aten.detach.default,
            aten.contiguous.default,
            aten.clone.default,
            aten.lift_fresh_copy.default,
            aten.lift_fresh.default,
            aten.lift.default,
            aten.positive.default,
            aten.resolve_conj.default,
            aten.resolve_neg.default,
            aten.conj_physical.default,
        ),
        Var("x"),
        ...,
    )
)
def copy_is_nothing(graph: Graph, found: Match) -> Node:
    """``clone(x) -> x``, and so for `contiguous`, `detach`, `alias`: values have no memory."""
    return found["x"]


_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


@rule(Call(_DROPOUTS, Var("x"), Var("p"), Var("train")))
def dropout_is_nothing(graph: Graph, found: Match) -> Node | Skip:
    """``dropout(x, p, train=False) -> x``."""
    if found["train"] and found["p"] != 0:
        return Skip("the model was captured in training mode")
    return found["x"]


_CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.to.prim_Device,
    aten.to.prim_dtype,
    aten._to_copy.default,
    aten.type_as.default,
    torch.ops.prims.convert_element_type.default,
)


@rule(Call(_CASTS, Var("x"), ...))
def cast_is_to_dtype(graph: Graph, found: Match) -> Node | Skip:
    """``type_as(x, y) -> to(x, dtype of y)``, and so for `to.device` and others.

    A cast to its own dtype is nothing. Devices are the business of whoever runs the graph.
    """
    root, x = found.root, found["x"]
    wanted = dtype_of(root)
    if wanted == dtype_of(x):
        return x
    if root.target is aten.to.dtype and root.args == (x, wanted) and not root.kwargs:
        return Skip("the dtype changes")
    return graph.call(aten.to.dtype, x, wanted, before=root, like=root)


@rule(Call(aten.to.dtype, Call(aten.to.dtype, Var("x"), Var("between")), Var("last")))
def cast_of_wider_cast(graph: Graph, found: Match) -> Node | Skip:
    """``to(to(x, a), b) -> to(x, b)``, where `a` holds every value of the dtype of `x`."""
    x: Node = found["x"]
    if not _holds(found["between"], dtype_of(x)):
        return Skip(f"{found['between']} does not hold every {dtype_of(x)}")
    if found["last"] == dtype_of(x):
        return x
    return graph.call(aten.to.dtype, x, found["last"], before=found.root, like=found.root)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    if narrow in (wide, torch.bool):
        return True
    if wide.is_floating_point and narrow.is_floating_point:
        one, two = torch.finfo(wide), torch.finfo(narrow)
        return one.eps <= two.eps and one.max >= two.max
    if not wide.is_floating_point and not narrow.is_floating_point and wide != torch.bool:
        one, two = torch.iinfo(wide), torch.iinfo(narrow)
        return one.min <= two.min and one.max >= two.max
    return False


@rule(
    AnyOf(
        Call(aten.add.Tensor, Var("x"), 0),
        Call(aten.mul.Tensor, Var("x"), 1),
        Call((aten.sub.Tensor, aten.sub.Scalar), Var("x"), 0),
        Call((aten.div.Tensor, aten.div.Scalar), Var("x"), 1),
        Call(aten.pow.Tensor_Scalar, Var("x"), 1),
    )
)
def neutral_operand(graph: Graph, found: Match) -> Node | Skip:
    """``x + 0 -> x``, ``x * 1 -> x``, and so for `sub`, `div` and `pow`."""
    x, root = found["x"], found.root
    if not is_tensor(x):
        return Skip("the result has the shape of the other operand")
    if dtype_of(x) != dtype_of(root):
        return Skip("the result has another dtype")
    if not same_shape(shape_of(x), shape_of(root)):
        return Skip("the result has another shape")
    return x


CLEANUP: tuple[Rule, ...] = (
    copy_is_nothing,
    dropout_is_nothing,
    cast_is_to_dtype,
    cast_of_wider_cast,
    neutral_operand,
)
