"""Sizes that are known when the model runs: symbolic integers as ONNX values."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lamella.errors import BackendError
from lamella.ir import ops

if TYPE_CHECKING:
    from lamella.backends.onnxruntime.emission import Emission

_ARITHMETIC: Mapping[Any, str] = MappingProxyType(
    {
        operator.add: "Add",
        operator.sub: "Sub",
        operator.mul: "Mul",
        operator.neg: "Neg",
        torch.sym_max: "Max",
        torch.sym_min: "Min",
    }
)


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are the same number or the same expression of symbols."""
    return str(left) == str(right)


def is_fixed(size: Any) -> bool:
    """Whether a size is a number; a symbol that turned out to be one counts."""
    return not isinstance(size, torch.SymInt) or str(size).lstrip("-").isdigit()


def extent_of(emission: Emission, node: Node) -> ir.Value:
    """A vector with the one integer that `node` computes.

    Raises:
        BackendError: It is computed by something that is no shape arithmetic.
    """
    if node.target is torch.ops.aten.sym_size.int:
        source, axis = node.args[0], node.args[1]
        assert isinstance(source, Node)
        assert isinstance(axis, int)
        axis %= source.meta["val"].ndim
        return emission.op("Shape", emission.tensor(source), start=axis, end=axis + 1)
    if node.target in (operator.floordiv, operator.mod):
        return _divided(emission, node)
    kind = _ARITHMETIC.get(node.target)
    if kind is None:
        raise BackendError(f"{ops.op_name(node.target)} computes no size (node {node.name})")
    return emission.op(kind, *(emission.extent(argument) for argument in node.args))


def _divided(emission: Emission, node: Node) -> ir.Value:
    """Division of integers that rounds down, and its remainder, as in Python."""
    numerator, divisor = (emission.extent(argument) for argument in node.args)
    if node.target is operator.mod:
        return emission.op("Mod", numerator, divisor)
    if not all(statically_known_true(_held(argument) >= 0) for argument in node.args):
        # Div of ONNX rounds towards zero.
        numerator = emission.op("Sub", numerator, emission.op("Mod", numerator, divisor))
    return emission.op("Div", numerator, divisor)


def reshape_target(before: Sequence[Any], after: Sequence[Any]) -> tuple[list[int], list[int]]:
    """A target for Reshape in terms of numbers, as far as they suffice.

    Args:
        before: Sizes of the input.
        after: Sizes of the result.

    Returns:
        The target, where 0 copies the size of the input at that place and -1 takes what is
        left; and the places that still have to be computed (-1 stands there too), which are
        none if one -1 suffices.
    """
    target: list[int] = []
    open_places: list[int] = []
    for place, size in enumerate(after):
        if is_fixed(size):
            target.append(int(size))
        elif place < len(before) and same_size(before[place], size):
            target.append(0)
        else:
            target.append(-1)
            open_places.append(place)
    return target, open_places if len(open_places) > 1 else []


def _held(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, Node) else argument
