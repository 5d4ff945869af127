"""Arithmetic and logic: one operator for each of the many spellings."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import dtype_of, is_tensor, parts_of
from lamella.rewrite.pattern import AnyOf, Call, Match, Number, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten

_SPELLINGS: dict[Any, Any] = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.div.Scalar_mode: aten.div.Tensor_mode,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.true_divide.Scalar: aten.div.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.divide.Scalar: aten.div.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.multiply.Scalar: aten.mul.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.subtract.Scalar: aten.sub.Tensor,
    aten.floor_divide.Scalar: aten.floor_divide.default,
    aten.absolute.default: aten.abs.default,
    aten.negative.default: aten.neg.default,
    aten.special_erf.default: aten.erf.default,
    aten.special_expit.default: aten.sigmoid.default,
    aten.arctan.default: aten.atan.default,
    aten.max.other: aten.maximum.default,
    aten.min.other: aten.minimum.default,
    aten.clip.default: aten.clamp.default,
    aten.greater.Tensor: aten.gt.Tensor,
    aten.greater.Scalar: aten.gt.Scalar,
    aten.greater_equal.Tensor: aten.ge.Tensor,
    aten.greater_equal.Scalar: aten.ge.Scalar,
    aten.less.Tensor: aten.lt.Tensor,
    aten.less.Scalar: aten.lt.Scalar,
    aten.less_equal.Tensor: aten.le.Tensor,
    aten.less_equal.Scalar: aten.le.Scalar,
    aten.not_equal.Tensor: aten.ne.Tensor,
    aten.not_equal.Scalar: aten.ne.Scalar,
    aten.special_softmax.default: aten.softmax.int,
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
}


@rule(Call(tuple(_SPELLINGS), ...))
def one_spelling(graph: Graph, found: Match) -> Node:
    """``true_divide(x, y) -> div(x, y)``, ``add.Scalar(x, 2) -> add.Tensor(x, 2)``, and so on."""
    root = found.root
    target, args, kwargs = parts_of(root)
    return graph.call(_SPELLINGS[target], *args, before=root, like=root, **kwargs)


@rule(Call((aten.add.Tensor, aten.sub.Tensor), Var("x"), Var("y"), alpha=Number("alpha")))
def alpha_is_product(graph: Graph, found: Match) -> Node | Skip:
    """``add(x, y, alpha=a) -> add(x, a * y)``, and so for `sub`."""
    root, y, alpha = found.root, found["y"], found["alpha"]
    if alpha == 1 and "alpha" not in root.kwargs and len(root.args) == 2:
        return Skip("there is no factor")
    scaled = y if alpha == 1 else _times(graph, y, alpha, root)
    target, *_ = parts_of(root)
    return graph.call(target, found["x"], scaled, before=root, like=root)


def _times(graph: Graph, y: Any, alpha: float, before: Node) -> Any:
    if not isinstance(y, Node):
        return y * alpha
    return graph.call(aten.mul.Tensor, y, alpha, before=before)


@rule(Call((aten.rsub.Scalar, aten.rsub.Tensor), Var("x"), Var("y"), alpha=Number("alpha")))
def rsub_without_alpha(graph: Graph, found: Match) -> Node | Skip:
    """``rsub(x, y, alpha=a) -> y - a * x``; with a number for `y` and no factor it stays."""
    root, x, y, alpha = found.root, found["x"], found["y"], found["alpha"]
    if is_tensor(y):
        scaled = x if alpha == 1 else _times(graph, x, alpha, root)
        return graph.call(aten.sub.Tensor, y, scaled, before=root, like=root)
    if alpha == 1:
        return Skip("a number minus a tensor has no other spelling")
    scaled = _times(graph, x, alpha, root)
    return graph.call(aten.rsub.Scalar, scaled, y, before=root, like=root)


@rule(Call(aten.square.default, Var("x")))
def square_is_pow(graph: Graph, found: Match) -> Node:
    """``square(x) -> x ** 2``."""
    return graph.call(aten.pow.Tensor_Scalar, found["x"], 2, before=found.root, like=found.root)


@rule(Call(aten.pow.Tensor_Tensor, Var("x"), Number("exponent")))
def power_of_number(graph: Graph, found: Match) -> Node:
    """``x ** tensor(2.0) -> x ** 2.0``."""
    root = found.root
    return graph.call(aten.pow.Tensor_Scalar, found["x"], found["exponent"], before=root, like=root)


@rule(
    AnyOf(
        Call(aten.clamp_min.default, Var("x"), Number("min")),
        Call(aten.clamp_max.default, Var("x"), Number("max")),
        Call(aten.relu6.default, Var("x")),
    )
)
def bound_is_clamp(graph: Graph, found: Match) -> Node:
    """``clamp_min(x, a) -> clamp(x, a, None)``, and so for `clamp_max` and `relu6`."""
    root = found.root
    low, high = found.get("min"), found.get("max")
    if root.target is aten.relu6.default:
        low, high = 0, 6
    return graph.call(aten.clamp.default, found["x"], low, high, before=root, like=root)


@rule(Call(aten.clamp.default, Var("x"), 0, None))
def clamp_is_relu(graph: Graph, found: Match) -> Node:
    """``clamp(x, min=0) -> relu(x)``."""
    return graph.call(aten.relu.default, found["x"], before=found.root, like=found.root)


_WITH_SCALAR: dict[Any, Any] = {
    aten.__and__.Scalar: aten.bitwise_and.Tensor,
    aten.bitwise_and.Scalar: aten.bitwise_and.Tensor,
    aten.__or__.Scalar: aten.bitwise_or.Tensor,
    aten.bitwise_or.Scalar: aten.bitwise_or.Tensor,
}


@rule(Call(tuple(_WITH_SCALAR), Var("x"), Var("value")))
def bits_of_number(graph: Graph, found: Match) -> Node:
    """``x & 3 -> bitwise_and(x, full([], 3))``, and so for ``|``."""
    root = found.root
    mask = graph.call(aten.full.default, [], found["value"], dtype=dtype_of(root), before=root)
    target = _WITH_SCALAR[root.target]
    return graph.call(target, found["x"], mask, before=root, like=root)


_LOGIC: dict[Any, Any] = {
    aten.__and__.Tensor: (aten.logical_and.default, aten.bitwise_and.Tensor),
    aten.bitwise_and.Tensor: (aten.logical_and.default, aten.bitwise_and.Tensor),
    aten.__or__.Tensor: (aten.logical_or.default, aten.bitwise_or.Tensor),
    aten.bitwise_or.Tensor: (aten.logical_or.default, aten.bitwise_or.Tensor),
    aten.bitwise_not.default: (aten.logical_not.default, aten.bitwise_not.default),
    aten.logical_xor.default: (aten.ne.Tensor, aten.ne.Tensor),
    aten.bitwise_xor.Tensor: (aten.ne.Tensor, None),
    aten.__xor__.Tensor: (aten.ne.Tensor, None),
}


@rule(Call(tuple(_LOGIC), Var("x"), ...))
def logic_of_booleans(graph: Graph, found: Match) -> Node | Skip:
    """``x & y -> logical_and(x, y)`` on booleans, ``bitwise_and`` on integers; so for `|`, `~`."""
    root = found.root
    boolean = all(dtype_of(node) == torch.bool for node in root.all_input_nodes)
    target = _LOGIC[root.target][0 if boolean else 1]
    if target is None or target is root.target:
        return Skip(f"{ops.op_name(root.target)} acts on bits")
    return graph.call(target, *root.args, before=root, like=root)


@rule(Call((aten.addcmul.default, aten.addcdiv.default), Var("x"), Var("y"), Var("z"), ...))
def addcmul_is_sum(graph: Graph, found: Match) -> Node:
    """``addcmul(x, y, z, value=v) -> x + v * (y * z)``, and so for `addcdiv`."""
    root = found.root
    product = root.target is aten.addcmul.default
    inner = aten.mul.Tensor if product else aten.div.Tensor
    value = graph.operand(root, "value")
    term = graph.call(inner, found["y"], found["z"], before=root)
    scaled = term if value == 1 else graph.call(aten.mul.Tensor, term, value, before=root)
    return graph.call(aten.add.Tensor, found["x"], scaled, before=root, like=root)


@rule(Call((aten.lerp.Scalar, aten.lerp.Tensor), Var("x"), Var("y"), Var("weight")))
def lerp_is_sum(graph: Graph, found: Match) -> Node:
    """``lerp(x, y, w) -> x + w * (y - x)``."""
    root, x = found.root, found["x"]
    difference = graph.call(aten.sub.Tensor, found["y"], x, before=root)
    scaled = graph.call(aten.mul.Tensor, difference, found["weight"], before=root)
    return graph.call(aten.add.Tensor, x, scaled, before=root, like=root)


_SOFTMAXES = (aten.softmax.int, aten.log_softmax.int)


@rule(Call(_SOFTMAXES, Var("x"), Var("dim"), Var("dtype")))
def softmax_without_dtype(graph: Graph, found: Match) -> Node | Skip:
    """``softmax(x, dim, dtype) -> softmax(to(x, dtype), dim)``."""
    root, x, dtype = found.root, found["x"], found["dtype"]
    if dtype is None:
        return Skip("there is no dtype")
    if dtype != dtype_of(x):
        x = graph.call(aten.to.dtype, x, dtype, before=root)
    target, *_ = parts_of(root)
    return graph.call(target, x, found["dim"], before=root, like=root)


ARITHMETIC: tuple[Rule, ...] = (
    one_spelling,
    alpha_is_product,
    rsub_without_alpha,
    square_is_pow,
    power_of_number,
    bound_is_clamp,
    clamp_is_relu,
    bits_of_number,
    logic_of_booleans,
    addcmul_is_sum,
    lerp_is_sum,
    softmax_without_dtype,
)
