"""GPTQ: columns make up for the errors of the columns before them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lamella.ir.quantize import Format, quantize
from lamella.passes.rounding.base import Rounded, Rounding, in_parts
from lamella.passes.rounding.feedback import fed_back
from lamella.passes.rounding.gram import InputGram
from lamella.passes.rounding.grid import Grid
from lamella.passes.rounding.refit import refitted


@dataclass(frozen=True)
class Columns:
    """A weight on a grid.

    Attributes:
        values: ``[in, out]``.
        grid: Where they lie; not those of columns that are free.
        damping: Share of the mean of the diagonal that was added to the Gram matrix.
    """

    values: Tensor
    grid: Grid
    damping: float


@dataclass(frozen=True)
class Gptq(Rounding):
    """Greedy minimization of ``tr((W - Q) G (W - Q)^T)``, column by column.

    Scales and zeros are first those of rounding to nearest, searched with the error of each column
    weighted by the mean square of its inputs. Then scales are fitted to the codes that came out,
    by least squares, and the columns are rounded again from the start, `refits` times over: the
    paper sets scales once. Scales are known before a column is rounded, therefore the order of
    columns leaves no trace in what is stored. Columns of inputs that are always zero are rounded
    to nearest (the authors' code sets them to zero, which harms inputs that the samples lack).

    Attributes:
        damping: Share of the mean of the diagonal that is added to the Gram matrix; ten times as
            much, up to 1, where the matrix is singular. The paper adds a hundredth; with the
            few tokens of a calibration, a tenth loses less on others.
        act_order: Round the columns with the largest inputs first.
        refits: How often scales are fitted and columns rounded again.

    References:
        [Frantar2023], section 3.
    """

    name: ClassVar[str] = "gptq"

    damping: float = 0.1
    act_order: bool = True
    refits: int = 4

    def round(self, weight: Tensor, format: Format, inputs: InputGram) -> Rounded:
        """To nearest, with infinite damping in the result, if the matrix can't be factored."""
        return in_parts(weight, lambda rows: self._rows(rows, format, inputs))

    def _rows(self, weight: Tensor, format: Format, inputs: InputGram) -> Rounded:
        grid = Grid.searched(weight, format, inputs.diagonal)
        found = self.on_grid(weight, grid, inputs)
        if found is None:
            return Rounded(quantize(weight, format), damping=math.inf)
        return Rounded(found.grid.store(found.values), damping=found.damping)

    def on_grid(
        self, weight: Tensor, grid: Grid, inputs: InputGram, free: Tensor | None = None
    ) -> Columns | None:
        """Round to a grid, and fit its scales.

        Args:
            weight: ``[out, in]``.
            grid: Where to start.
            inputs: The Gram matrix.
            free: Which columns are not rounded, bool ``[in]``.

        Returns:
            None if the matrix can't be factored.
        """
        factor = inputs.factor(self.damping, act_order=self.act_order)
        if factor is None:
            return None
        turned = weight.t().contiguous()
        values = fed_back(turned, factor, grid.nearest_but(free))
        damped = inputs.damped(factor.damping)
        for _ in range(self.refits):
            values, grid = refitted(turned, values, grid, damped, free)
            values = fed_back(turned, factor, grid.nearest_but(free))
        return Columns(values, grid, factor.damping)
