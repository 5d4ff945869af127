"""Where relevance stays: what every node keeps of what it gets.

``leak(y) = <y, M_y> - sum <x_k, M_xk>`` over the operands that relevance goes on to. Coefficients
add where a value is read more than once, so that ``<seed, output> = sum over inputs <x, M_x> +
sum over nodes leak`` holds exactly, whatever the rules are. All sums are taken in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.ops import aten, lam
from lamella.passes.relevance.request import relevance_of
from lamella.passes.relevance.sweep import Step
from lamella.passes.relevance.traced import Recorder
from lamella.rules.relevance.roles import Role
from lamella.rules.relevance.rule import Terminal


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        node: Name of the node that keeps it.
        operator: ``aten.linear.default``.
        cause: ``"bias"``, ``"constant"`` (weights and numbers that are added), ``"position"``
            (masks, position codes), ``"activation"``, ``"norm"``, ``"softmax"``, ``"attention"``,
            ``"product"``, ``"stabilizer"``, ``"rounding"``, ``"scan"`` or ``"other"``.
    """

    node: str
    operator: str
    cause: str


_CAUSES: Mapping[Callable[..., Any], str] = MappingProxyType(
    {
        **dict.fromkeys((aten.softmax.int, aten.log_softmax.int), "softmax"),
        **dict.fromkeys(
            (aten.mul.Tensor, aten.div.Tensor, aten.matmul.default, aten.einsum.default), "product"
        ),
        **dict.fromkeys(
            (aten.to.dtype, lam.linear_nbits.default, lam.linear_int8.default), "rounding"
        ),
        **dict.fromkeys((lam.round_uniform.default, lam.round_log.default), "rounding"),
        **dict.fromkeys((lam.linear_int8_static.default, lam.conv_int8.default), "rounding"),
        **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar), "constant"),
        **dict.fromkeys((aten.cat.default, aten.stack.default), "constant"),
        **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), "constant"),
        **dict.fromkeys(
            (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), "constant"
        ),
        **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), "constant"),
    }
)
_BY_CATEGORY: Mapping[str, str] = MappingProxyType(
    {
        "elementwise": "activation",
        "contraction": "stabilizer",
        "normalization": "norm",
        "attention": "attention",
        "scan": "scan",
    }
)
_ADDED = frozenset(
    {
        *(aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default),
        *(aten.where.self, aten.masked_fill.Tensor, aten.index_put.default, aten.scatter.src),
        *(aten.where.ScalarOther, aten.where.ScalarSelf, aten.scatter_add.default),
    }
)
"""Operators that add up their operands: a constant one absorbs a part."""


@dataclass(frozen=True)
class Line:
    """An entry with its amount, a traced scalar of float64 that is written already."""

    entry: Entry
    amount: Any


def lines_of(step: Step, recorder: Recorder, roles: Mapping[Node, Role]) -> list[Line]:
    """What a step of a sweep keeps, apart by cause.

    The amounts are written at once, while the values are there anyway.
    """
    left = _held(step, recorder)
    lines: list[Line] = []
    for operand, part in step.given:
        if operand in step.passes:
            left = left - amount(recorder.value(operand), part)
        elif cause := _absorbs(step.node, operand, roles):
            share = amount(recorder.value(operand), part)
            left = left - share
            lines.append(Line(_entry(step.node, cause), share))
    cause = _CAUSES.get(step.node.target)  # pyright: ignore[reportArgumentType]
    if cause is None:
        facts = ops.facts(step.node.target)
        cause = _BY_CATEGORY.get(facts.category if facts else "", "other")
    lines.append(Line(_entry(step.node, cause), left))
    return [Line(line.entry, recorder.value(line.amount.node)) for line in lines]


def _held(step: Step, recorder: Recorder) -> Any:
    """``<y, M_y>``, over all results."""
    value = recorder.value(step.node)
    if not isinstance(step.coefficient, tuple):
        return amount(value, step.coefficient)
    parts = [
        amount(value[place], part)
        for place, part in enumerate(step.coefficient)
        if part is not None
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def amount(value: Any, coefficient: Any) -> Any:
    """``<value, coefficient>`` in float64; of a terminal rule the sum of its relevance."""
    if isinstance(coefficient, Terminal):
        return aten.sum.default(widened(coefficient.relevance))
    return aten.sum.default(relevance_of(widened(value), widened(coefficient)))


def widened(value: Any) -> Any:
    """`value` in float64."""
    return value if value.dtype == torch.float64 else aten.to.dtype(value, torch.float64)


def _absorbs(node: Node, operand: Node, roles: Mapping[Node, Role]) -> str | None:
    """Why a constant operand keeps a part of the relevance, if its part is known."""
    bound = ops.bind(node)
    if bound.get("bias") is operand:
        return "bias"
    if node.target in _ADDED:
        return "position" if roles[operand] is Role.POSITION else "constant"
    return None


def _entry(node: Node, cause: str) -> Entry:
    return Entry(node.name, ops.op_name(node.target), cause)
