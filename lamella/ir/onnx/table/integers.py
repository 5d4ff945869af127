"""Products of 8-bit integers, whose activations are rounded when they arrive."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.table.elementwise import cast
from lamella.ir.onnx.values import Constant, Op, Result, Table, Value
from lamella.ir.operators import SMALLEST_STEP

aten = torch.ops.aten
lam = torch.ops.lamella

_LEAST = 1.0001 * SMALLEST_STEP
"""The smallest step after it went through float32."""


def dynamic_quantize(g: Builder, op: Op) -> Result:
    """Codes, scale and zero of a whole tensor, by its own range."""
    value = op[0]
    flat = g.call(aten.reshape.default, value, [-1])
    low, high = (g.call(extreme, flat, [0]) for extreme in (aten.amin.default, aten.amax.default))
    low, high = g.call(aten.clamp.default, low, None, 0.0), g.call(aten.clamp.default, high, 0.0)
    step = g.call(aten.div.Tensor, g.call(aten.sub.Tensor, high, low), 255.0)
    step = g.call(aten.where.ScalarSelf, g.call(aten.eq.Scalar, step, 0.0), 1.0, step)
    zero = g.call(aten.round.default, g.call(aten.div.Tensor, g.call(aten.neg.default, low), step))
    zero = g.call(aten.clamp.default, zero, 0.0, 255.0)
    rounded = g.call(aten.round.default, g.call(aten.div.Tensor, value, step))
    shifted = g.call(aten.clamp.default, g.call(aten.add.Tensor, rounded, zero), 0.0, 255.0)
    return cast(g, shifted, torch.uint8), step, cast(g, zero, torch.uint8)


def dynamic_matmul(g: Builder, op: Op) -> Result:
    """`DynamicQuantizeMatMul`: a linear layer whose input is rounded with one scale."""
    weight = _matrix(g, op[1], op[2], op.optional(3))
    op.need(weight is not None, "a weight that is not constant, or has zero points")
    assert weight is not None
    bias = op.optional(4)
    return g.call(lam.linear_int8.default, op[0], *weight, bias, False)


def matmul_to_float(g: Builder, op: Op) -> Result:
    """`MatMulIntegerToFloat`: a product of integers, scaled."""
    scale, zero, bias = op[2], op.optional(4), op.optional(6)
    weight = _matrix(g, op[1], op[3], op.optional(5))
    rounded = _rounded(g, op[0], scale, zero)
    if weight is None or rounded is None:
        total = _product(g, (op[0], zero), (op[1], op.optional(5)))
        result = g.call(aten.mul.Tensor, total, g.call(aten.mul.Tensor, scale, op[3]))
        return result if bias is None else g.call(aten.add.Tensor, result, bias)
    source, step = rounded
    if step is None:
        return g.call(lam.linear_int8.default, source, *weight, bias, False)
    layer = g.call(lam.linear_int8.default, source, *weight, None, True)
    # What comes next multiplies by the scales of the rows; `settle` removes both.
    result = g.call(aten.div.Tensor, layer, step)
    return result if bias is None else g.call(aten.add.Tensor, result, bias)


def matmul_integer(g: Builder, op: Op) -> Result:
    """A product of integers, as int32."""
    total = _product(g, (op[0], op.optional(2)), (op[1], op.optional(3)))
    return cast(g, total, torch.int32)


def settle(graph: Graph) -> None:
    """Let rows be scaled by `lamella::linear_int8` itself, and a bias be added by it."""
    for layer in graph.find(lam.linear_int8.default):
        for divided, step in _pairs(layer, aten.div.Tensor):
            for scaled, other in _pairs(divided, aten.mul.Tensor):
                if other is step:
                    graph.replace(scaled, layer)
                    graph.erase([scaled])
            if not divided.users:
                graph.erase([divided])
        _take_bias(graph, layer)


# ---- parts ----------------------------------------------------------------------------------


def _matrix(
    g: Builder, codes: Value, scale: Value, zero: Value | None
) -> tuple[Constant, Constant] | None:
    """The matrix ``[out, in]`` as signed codes around zero, and a scale for each output."""
    if not (g.is_constant(codes) and g.is_constant(scale)) or g.rank(codes) != 2:
        return None
    data, scales = g.constant(codes), g.constant(scale)
    middle = 0 if data.tensor.dtype is torch.int8 else 128
    if zero is None:
        given: Tensor = torch.zeros(1)
    elif g.is_constant(zero):
        given = g.constant(zero).tensor
    else:
        return None
    if not bool((given == middle).all()):
        return None
    turned = data.tensor.t()
    if middle:
        turned = (turned.to(torch.int16) - middle).to(torch.int8)
    wide = scales.tensor.reshape(-1).expand(turned.shape[0])
    return (
        Constant(turned, data.name, transposed=not data.transposed),
        Constant(wide, scales.name),
    )


def _rounded(
    g: Builder, codes: Value, scale: Value, zero: Value | None
) -> tuple[Node, Node | None] | None:
    """What was rounded to `codes`, and the scales of its rows (None for one scale for all)."""
    added = _under(codes, aten.reshape.default, aten.to.dtype, aten.clamp.default)
    if added is None or added.target is not aten.add.Tensor:
        return None
    quotient, shift = _under(added.args[0], aten.round.default), added.args[1]
    if quotient is None or quotient.target is not aten.div.Tensor or not isinstance(shift, Node):
        return None
    rows, step = quotient.args[0], _under(quotient.args[1], aten.reshape.default)
    if step is None or not isinstance(rows, Node):
        return None
    if step is scale and zero is not None and _under(zero, aten.to.dtype) is shift:
        return (rows, None) if _is_range_of(step, rows) else None
    lifted = _under(shift, aten.to.dtype, aten.reshape.default, aten.expand.default)
    middle = lifted is not None and lifted.op == "get_attr" and _is_all(g.graph.weight(lifted), 128)
    source = _whose_rows(step)
    if source is None or not (middle and _is_all(scale, 1) and _is_all(zero, 128)):
        return None
    return (source, step) if rows is source or _is_flat(rows, source) else None


def _is_range_of(step: Node, source: Node) -> bool:
    """Whether `step` is the scale that `dynamic_quantize` computes for `source`."""
    span = _under(step.args[-1], aten.div.Tensor)
    if step.target is not aten.where.ScalarSelf or span is None or len(span.args) != 2:
        return False
    ends = [_under(end, aten.clamp.default) for end in span.args]
    kinds = (aten.amax.default, aten.amin.default)
    return all(
        end is not None and end.target is kind and _is_flat(end.args[0], source)
        for end, kind in zip(ends, kinds, strict=True)
    )


def _whose_rows(step: Node) -> Node | None:
    """The value of whose rows `step` is ``max|x| / 127``, kept away from zero."""
    quotient = _under(step, aten.clamp.default)
    bounded = step.target is aten.clamp.default and 0 < ops.bind(step)["min"] <= _LEAST
    if not bounded or quotient is None or quotient.args[1:] != (127.0,):
        return None
    largest = quotient.args[0]
    if not isinstance(largest, Node) or largest.target is not aten.amax.default:
        return None
    absolute, axes, kept = largest.args
    source = absolute.args[0] if isinstance(absolute, Node) else None
    if not isinstance(source, Node) or _under(absolute, aten.abs.default) is absolute:
        return None
    return source if kept and axes == [source.meta["val"].ndim - 1] else None


def _is_flat(value: Any, source: Node) -> bool:
    """Whether `value` is `source` in another shape."""
    reshaped = isinstance(value, Node) and value.target is aten.reshape.default
    return reshaped and value.args[0] is source


def _under(value: Any, *targets: Any) -> Node | None:
    """What `value` is made of when calls of `targets` are taken off."""
    while isinstance(value, Node) and value.target in targets:
        value = value.args[0]
    return value if isinstance(value, Node) else None


def _is_all(value: Any, number: int) -> bool:
    """Whether the data of a constant is `number` everywhere."""
    tensor = value.tensor if isinstance(value, Constant) else value
    return isinstance(tensor, Tensor) and bool((tensor == number).all())


def _product(
    g: Builder, first: tuple[Value, Value | None], second: tuple[Value, Value | None]
) -> Any:
    """The product of two integer matrices after their zeros are taken off, as floats."""
    wide = list[Value]()
    for codes, zero in (first, second):
        value = cast(g, codes, torch.float32)
        if zero is not None:
            value = g.call(aten.sub.Tensor, value, cast(g, zero, torch.float32))
        wide.append(value)
    return g.call(aten.matmul.default, *wide)


def _pairs(node: Node, target: Any) -> Iterator[tuple[Node, Node]]:
    """The readers of `node` that call `target`, each with the other operand."""
    for user in list(node.users):
        if user.target is target:
            bound = ops.bind(user)
            operands = [bound["self"], bound["other"]]
            if operands[0] is node or (operands[1] is node and target is not aten.div.Tensor):
                other = operands[1] if operands[0] is node else operands[0]
                if isinstance(other, Node):
                    yield user, other


def _take_bias(graph: Graph, layer: Node) -> None:
    bound = ops.bind(layer)
    width = layer.meta["val"].shape[-1]
    for added, bias in _pairs(layer, aten.add.Tensor):
        fits = bias.op == "get_attr" and tuple(bias.meta["val"].shape) == (width,)
        if fits and bound["bias"] is None and len(layer.users) == 1:
            args = (bound["input"], bound["weight"], bound["scales"], bias, bound["per_row"])
            graph.replace(added, graph.call(lam.linear_int8.default, *args, before=added))


TABLE: Table = MappingProxyType(
    {"DynamicQuantizeLinear": dynamic_quantize, "MatMulInteger": matmul_integer}
)
"""ONNX operator -> builder."""
