"""GPTQ: columns make up for the errors of the columns before them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lamella.ir.quantize import Format, quantize
from lamella.passes.rounding.base import Rounded, Rounding
from lamella.passes.rounding.feedback import fed_back
from lamella.passes.rounding.gram import InputGram
from lamella.passes.rounding.grid import Grid


@dataclass(frozen=True)
class Gptq(Rounding):
    """Greedy minimization of ``tr((W - Q) G (W - Q)^T)``, column by column.

    Scales and zeros are those of rounding to nearest, searched beforehand with the error of each
    column weighted by the mean square of its inputs. Therefore the order in which columns are
    rounded leaves no trace in what is stored. Columns of inputs that are always zero are rounded
    to nearest (the authors' code sets them to zero, which harms inputs that the samples lack).

    Attributes:
        damping: Share of the mean of the diagonal that is added to the Gram matrix; ten times as
            much, up to 1, where the matrix is singular.
        act_order: Round the columns with the largest inputs first.

    References:
        [Frantar2023], section 3.
    """

    name: ClassVar[str] = "gptq"

    damping: float = 0.01
    act_order: bool = True

    def round(self, weight: Tensor, format: Format, inputs: InputGram) -> Rounded:
        """To nearest, with infinite damping in the result, if the matrix can't be factored."""
        found = self.columns(weight, format, inputs)
        if found is None:
            return Rounded(quantize(weight, format), damping=math.inf)
        values, grid, damping = found
        return Rounded(grid.store(values), damping=damping)

    def columns(
        self,
        weight: Tensor,
        format: Format,
        inputs: InputGram,
        free: Tensor | None = None,
    ) -> tuple[Tensor, Grid, float] | None:
        """What is stored, ``[in, out]``, the grid it lies on, and the damping.

        Args:
            weight: ``[out, in]``.
            format: The format.
            inputs: The Gram matrix.
            free: Which columns are not rounded, bool ``[in]``; the grid doesn't see them.

        Returns:
            None if the matrix can't be factored.
        """
        factor = inputs.factor(self.damping, act_order=self.act_order)
        if factor is None:
            return None
        seen = weight if free is None else weight.masked_fill(free, 0)
        grid = Grid.searched(seen, format, inputs.diagonal)
        turned = weight.t().contiguous()
        return fed_back(turned, factor, grid.nearest_but(free)), grid, factor.damping
