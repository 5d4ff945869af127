"""Sizes that are known when the model runs: which are numbers, which are the same."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

ARITHMETIC: Mapping[Any, str] = MappingProxyType(
    {
        operator.add: "Add",
        operator.sub: "Sub",
        operator.mul: "Mul",
        operator.neg: "Neg",
        torch.sym_max: "Max",
        torch.sym_min: "Min",
    }
)
"""Arithmetic of sizes -> the operator of ONNX."""


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are the same number or the same expression of symbols."""
    return str(left) == str(right)


def is_fixed(size: Any) -> bool:
    """Whether a size is a number; a symbol that turned out to be one counts."""
    return not isinstance(size, torch.SymInt) or str(size).lstrip("-").isdigit()


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
