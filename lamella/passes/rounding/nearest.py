"""Rounding to nearest: each entry for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lamella.ir.quantize import Format, quantize
from lamella.passes.rounding.base import Rounded, Rounding
from lamella.passes.rounding.gram import InputGram


@dataclass(frozen=True)
class Nearest(Rounding):
    """Round to nearest with searched scales.

    Attributes:
        by_inputs: Search scales that weigh the error of each column by the mean square of its
            inputs.
    """

    name: ClassVar[str] = "rtn"

    by_inputs: bool = False

    def round(self, weight: Tensor, format: Format, inputs: InputGram) -> Rounded:
        """See `lamella.ir.quantize`."""
        return Rounded(quantize(weight, format, inputs.diagonal if self.by_inputs else None))
