"""Rounding column by column, where later columns make up for the errors of earlier ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lamella.passes.rounding.gram import Factor

COLUMNS = 64
"""Columns whose errors are carried on one by one; those of all before in one product."""

Nearest = Callable[[int, Tensor], Tensor]
"""``nearest(column, values)``: the entries of a column as they are stored, ``[out]``."""


def fed_back(weight: Tensor, factor: Factor, nearest: Nearest) -> Tensor:
    """Round the columns in the order of `factor`; each sees the errors of those before it.

    Column k is rounded from ``w_k + sum_{j<k} (w_j - q_j) F_jk``: the least of the error
    ``(w - q) G (w - q)^T`` over the columns from k on, the ones before being as they are. This
    is the recursion of the paper, which carries ``(w_j - q_j) / U_jj U_jk`` on with the upper
    factor U of the inverse: ``F = D U^T^-1`` holds the same numbers without an inverse.

    Args:
        weight: ``[in, out]``.
        factor: Of the Gram matrix.
        nearest: Rounds one column, called by its place in `weight`.

    Returns:
        What is stored, ``[in, out]`` in the order of `weight`.

    References:
        [Frantar2023], algorithm 1; [Chee2023], theorem 6 for the form without an inverse.
    """
    order: list[int] = factor.order.tolist()
    lower = factor.lower.to(weight.dtype)
    sorted_weight = weight[factor.order]
    errors = torch.zeros_like(sorted_weight)
    result = torch.empty_like(weight)
    for start in range(0, len(order), COLUMNS):
        stop = min(start + COLUMNS, len(order))
        targets = torch.addmm(sorted_weight[start:stop], lower[start:stop, :start], errors[:start])
        for place in range(start, stop):
            inside = errors[start:place]
            target = torch.addmv(targets[place - start], inside.t(), lower[place, start:place])
            stored = nearest(order[place], target)
            torch.sub(sorted_weight[place], stored, out=errors[place])
            result[order[place]] = stored
    return result


def descended(weight: Tensor, start: Tensor, gram: Tensor, nearest: Nearest, sweeps: int) -> Tensor:
    """Round each column again with all others as they are, some times over.

    Column k becomes the value of the grid nearest to ``q_k + ((w - q) G)_k / G_kk``, which is
    the best there is: the error ``(w - q) G (w - q)^T`` of a row never grows. It ends early
    when a sweep changes nothing.

    Args:
        weight: ``[in, out]``.
        start: What is stored so far, ``[in, out]``.
        gram: G without damping, ``[in, in]``.
        nearest: Rounds one column.
        sweeps: How often every column is visited.

    References:
        [Behdin2023], equation 12.
    """
    result = start.clone()
    gram = gram.to(weight.dtype)
    curvature: list[float] = gram.diagonal().tolist()
    residual = gram @ (weight - result)
    for _ in range(sweeps):
        changed = False
        for first in range(0, len(curvature), COLUMNS):
            block = slice(first, min(first + COLUMNS, len(curvature)))
            changes = _visit(result, residual, gram, (block, curvature), nearest)
            if bool(changes.any()):
                changed = True
                residual.addmm_(gram[:, block], changes, alpha=-1)
        if not changed:
            break
    return result


def _visit(
    result: Tensor,
    residual: Tensor,
    gram: Tensor,
    place: tuple[slice, list[float]],
    nearest: Nearest,
) -> Tensor:
    """Round the columns of a block again, in place, and give what changed, ``[block, out]``."""
    block, curvature = place
    changes = torch.zeros_like(result[block])
    for offset, column in enumerate(range(block.start, block.stop)):
        if curvature[column] <= 0:
            continue
        known = gram[column, block.start : column]
        slope = torch.addmv(residual[column], changes[:offset].t(), known, alpha=-1)
        target = slope.div_(curvature[column]).add_(result[column])
        stored = nearest(column, target)
        torch.sub(stored, result[column], out=changes[offset])
        result[column] = stored
    return changes
