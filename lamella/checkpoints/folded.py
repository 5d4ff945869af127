"""Back from a constant that was folded to the weight it was computed from.

Canonicalization computes what depends on weights alone once: ``1 + w`` of a norm, ``-exp(a)`` of a
state space, rows of a table. A checkpoint holds the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.checkpoints.matching import evaluate, weights_of
from lamella.errors import CheckpointError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten

_MOVES = frozenset({"view", "indexing"})
"""Kinds of operators that only choose and move entries."""

Step = Callable[[Tensor, Any, bool], Tensor]

_INVERSE: Mapping[Any, Step] = MappingProxyType(
    {
        aten.add.Tensor: lambda y, c, first: y - c,
        aten.sub.Tensor: lambda y, c, first: y + c if first else c - y,
        aten.rsub.Scalar: lambda y, c, first: c - y,
        aten.mul.Tensor: lambda y, c, first: y / c,
        aten.div.Tensor: lambda y, c, first: y * c if first else c / y,
        aten.neg.default: lambda y, c, first: -y,
        aten.exp.default: lambda y, c, first: torch.log(y),
        aten.log.default: lambda y, c, first: torch.exp(y),
    }
)
"""Operator -> its operand, from the value, the other operand, and whether the operand was first."""


def unfolded(model: Graph, node: Node, value: Tensor) -> Tensor:
    """The weight of which the constant `node` of `model` is `value`.

    Entries of the weight that the constant doesn't show (rows that are never looked up) are zero.

    Args:
        model: A graph without data that has not folded the constant.
        node: The constant: an expression of exactly one weight without data.
        value: What it is to be.

    Raises:
        CheckpointError: The expression can't be turned round.
    """
    sources = [weight for weight in weights_of(node) if not model.is_loaded(weight)]
    if len(sources) != 1:
        names = ", ".join(str(source.target) for source in sources)
        raise CheckpointError(
            f"{names} were computed into one constant, which no longer says what each of them is; "
            f"capture the model from its folder, and leave them as they are there"
        )
    found = _back(model, node, value, sources[0])
    if not agrees(evaluate(model, node, {sources[0]: found}), value):
        raise CheckpointError(f"no value of {sources[0].target} gives the constant folded from it")
    return found


def agrees(got: Tensor, want: Tensor) -> bool:
    """Equal up to two roundings of the dtype of `want`."""
    if got.shape != want.shape:
        return False
    eps = torch.finfo(want.dtype).eps if want.is_floating_point() else 0.0
    scale = float(want.abs().max()) if want.numel() else 0.0
    return torch.allclose(got.to(want.dtype), want, rtol=2 * eps, atol=2 * eps * scale)


def _back(model: Graph, node: Node, value: Tensor, source: Node) -> Tensor:
    """Step by step from the value of `node` to that of `source`."""
    while node is not source:
        step = next(one for one in node.all_input_nodes if source in weights_of(one))
        facts = ops.facts(node.target)
        if facts is not None and facts.category in _MOVES:
            value = _moved_back(model, node, step, value)
        elif node.target is aten.to.dtype:
            value = value.to(step.meta["val"].dtype)
        else:
            value = _inverted(model, node, step, value)
        node = step
    return value


def _inverted(model: Graph, node: Node, step: Node, value: Tensor) -> Tensor:
    inverse = _INVERSE.get(node.target)
    if inverse is None:
        raise CheckpointError(f"{ops.op_name(node.target)} of a weight can't be turned round")
    operands = list(node.args[:2])
    others = [one for one in operands if one is not step]
    other = others[0] if others else None
    if isinstance(other, Node):
        other = evaluate(model, other, {})
    return inverse(value, other, operands[0] is step)


def _moved_back(model: Graph, node: Node, step: Node, value: Tensor) -> Tensor:
    """The operator moves the numbers of the entries; the entries go back where theirs came from."""
    fake = step.meta["val"]
    numbers = torch.arange(fake.numel()).reshape(fake.shape)
    moved = evaluate(model, node, {step: numbers})
    result = torch.zeros(fake.numel(), dtype=value.dtype)
    result[moved.reshape(-1)] = value.reshape(-1)
    return result.reshape(fake.shape)
