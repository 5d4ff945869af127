"""Scales that fit the codes: least squares, one block of columns after the other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lamella.passes.rounding.grid import Grid


def refitted(
    weight: Tensor, values: Tensor, grid: Grid, gram: Tensor, free: Tensor | None = None
) -> tuple[Tensor, Grid]:
    """Give each block of a row the scale of least error, with all codes as they are.

    The entries of block b are ``s_b c`` with whole numbers c. With the residual ``r = (w - q) G``
    the best step of the scale is ``<r_b, c> / (c G_bb c)``, the minimum of a parabola; the scale
    is rounded to the dtype in which it is stored, and kept as it was where that gains nothing.
    The error ``(w - q) G (w - q)^T`` of a row never grows.

    Args:
        weight: ``[in, out]``.
        values: What is stored so far, ``[in, out]``.
        grid: The grid that they lie on.
        gram: G, ``[in, in]``.
        free: Which columns are not on the grid, bool ``[in]``; they stay as they are.

    Returns:
        The values with their new scales, and the grid that they lie on.
    """
    gram = gram.to(weight.dtype)
    result, scales = values.clone(), grid.scales.clone()
    residual = gram @ (weight - result)
    size = grid.block
    for place, scale in enumerate(grid.scales):
        block = slice(place * size, min((place + 1) * size, len(result)))
        codes = result[block] / scale
        if free is not None:
            codes.masked_fill_(free[block, None], 0)
        slope = (residual[block] * codes).sum(0)
        curvature = (codes * (gram[block, block] @ codes)).sum(0)
        step = _stored(grid, scale, slope, curvature) - scale
        scales[place] += step
        changes = codes * step
        result[block] += changes
        residual.addmm_(gram[:, block], changes, alpha=-1)
    return result, replace(grid, scales=scales)


def _stored(grid: Grid, scale: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """The scale at the minimum, as it is stored; `scale` where that is no better or no number."""
    best = scale + torch.where(curvature > 0, slope / curvature, 0.0)
    stored = best.to(grid.format.scale_dtype).to(scale.dtype)
    step = stored - scale
    better = step * (2 * slope - step * curvature) > 0
    return torch.where(better & torch.isfinite(stored) & (stored != 0), stored, scale)
