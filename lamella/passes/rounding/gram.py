"""The Gram matrix of the inputs of a layer, and its factor that carries rounding errors on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """``P (G + d I) P^T = F D F^T`` with F unit upper triangular and D diagonal.

    An error made in column j changes what is best for the later column k by ``F[j, k]``.

    Attributes:
        order: The columns in the order in which they are rounded, ``[in]``.
        lower: ``F^T``, unit lower triangular, ``[in, in]``.
        pivots: The diagonal of D, ``[in]``: the curvature along a column when those after it
            follow; its inverse is the squared diagonal entry of the factor of the inverse.
        damping: ``d`` as a share of the mean of the diagonal of G.
    """

    order: Tensor
    lower: Tensor
    pivots: Tensor
    damping: float


class InputGram:
    """What is known of the inputs of linear layers: ``G = sum_t r_t x_t x_t^T / sum_t r_t``.

    A factor is computed when it is first asked for, once for all weights that read the value.
    """

    def __init__(self, matrix: Tensor, tokens: int) -> None:
        """Keep the matrix.

        Args:
            matrix: G, ``[in, in]``.
            tokens: How many rows it is the mean of.
        """
        self.matrix = matrix
        self.tokens = tokens
        self._factors: dict[tuple[float, bool], Factor | None] = {}

    @property
    def diagonal(self) -> Tensor:
        """The mean square of each input, ``[in]``, not negative."""
        return self.matrix.diagonal().clamp(min=0)

    @property
    def scale(self) -> float:
        """The mean of the diagonal over inputs that are not always zero; 0 without any."""
        diagonal = self.diagonal
        alive = diagonal > 0
        return float(diagonal[alive].mean()) if bool(alive.any()) else 0.0

    def damped(self, share: float) -> Tensor:
        """``G + share * scale * I``."""
        matrix = self.matrix.clone()
        matrix.diagonal().add_(share * self.scale)
        return matrix

    def factor(self, damping: float, *, act_order: bool = True) -> Factor | None:
        """The factor with at least `damping`; ten times as much, up to 1, where that fails.

        Inputs that are always zero take no part: their columns come last and carry nothing on.

        Args:
            damping: Share of the mean of the diagonal that is added to it.
            act_order: Round the columns with the largest inputs first; otherwise as they lie.

        Returns:
            None if the matrix is zero, or has no factor with a damping of 1.
        """
        key = (damping, act_order)
        if key not in self._factors:
            self._factors[key] = self._factor(damping, act_order)
        return self._factors[key]

    def error(self, difference: Tensor) -> Tensor:
        """``d G d^T`` for each row d of `difference`; float64 ``[out]``."""
        matrix = self.matrix.to(difference.dtype)
        return ((difference @ matrix) * difference).sum(1, dtype=torch.float64)

    def _factor(self, damping: float, act_order: bool) -> Factor | None:
        diagonal, mean = self.diagonal, self.scale
        alive = diagonal > 0
        if not mean > 0 or not math.isfinite(mean):
            return None
        order = torch.arange(len(diagonal))
        if act_order:
            order = diagonal.argsort(descending=True, stable=True)
        for share in _shares(damping):
            found = _factored(self.matrix[order][:, order], alive[order], share * mean)
            if found is not None:
                return Factor(order, *found, share)
        return None


def _shares(damping: float) -> list[float]:
    """`damping` times 1, 10, 100, … up to 1."""
    shares = [damping]
    while 0 < shares[-1] < 1:
        shares.append(min(1.0, shares[-1] * 10))
    return shares if damping > 0 else [0.0, 0.01, 0.1, 1.0]


def _factored(matrix: Tensor, alive: Tensor, added: float) -> tuple[Tensor, Tensor] | None:
    """The unit lower triangular ``F^T`` and the pivots of ``matrix + added * I``.

    `matrix` is a copy that is written into.
    """
    diagonal = matrix.diagonal()
    diagonal += added
    diagonal[~alive] = 1
    # The Cholesky factor of the matrix turned by half a turn is that of F D F^T, turned.
    turned, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed) or not bool(torch.isfinite(turned).all()):
        return None
    upper = turned.flip(0, 1)
    roots = upper.diagonal().clone()
    return (upper / roots).t().contiguous(), roots.square()
