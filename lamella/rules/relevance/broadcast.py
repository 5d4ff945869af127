"""Shapes of coefficients: the adjoints of broadcasting, and values of a given shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamella.ir.ops import aten


def is_one(size: Any) -> bool:
    """Whether a size is known to be one."""
    return isinstance(size, int) and size == 1


def sum_to(coefficient: Any, operand: Any) -> Any:
    """The adjoint of broadcasting `operand`: sums over the axes that were repeated.

    Returns:
        Of the shape of `operand`; None for a number.
    """
    if not hasattr(operand, "shape"):
        return None
    extra = coefficient.ndim - operand.ndim
    repeated = [
        axis + extra
        for axis, size in enumerate(operand.shape)
        if is_one(size) and not is_one(coefficient.shape[axis + extra])
    ]
    if repeated:
        coefficient = aten.sum.dim_IntList(coefficient, repeated, True)
    if extra:
        coefficient = aten.sum.dim_IntList(coefficient, list(range(extra)))
    return coefficient


def full_like(value: Any, number: float) -> Any:
    """A tensor of one number, of the shape and dtype of `value`."""
    return aten.full.default(list(value.shape), number, dtype=value.dtype)


def times(coefficient: Any, factor: float) -> Any:
    """`coefficient` times a number."""
    return coefficient if factor == 1.0 else coefficient * factor


def product_of(sizes: Sequence[Any]) -> Any:
    """The product of some sizes."""
    result: Any = 1
    for size in sizes:
        result = size if is_one(result) else (result if is_one(size) else result * size)
    return result


def axes_of(dim: Any, rank: int) -> list[int]:
    """The axes that a reduction over `dim` takes, counted from the front; None means all."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(rank))
    given = [dim] if isinstance(dim, int) else list(dim)
    return sorted(int(axis) % max(rank, 1) for axis in given)


def ratio(numerator: Any, denominator: Any, limit: float) -> Any:
    """``numerator / denominator``, and `limit` where the denominator is zero."""
    at_zero = denominator == 0
    safe = aten.where.ScalarSelf(at_zero, 1.0, denominator)
    return aten.where.ScalarSelf(at_zero, limit, numerator / safe)
