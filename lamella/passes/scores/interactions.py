"""What several weights lose together: more than the sum where their errors point the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.errors import PassError
from lamella.ir.quantize import Format

Choice = Mapping[str, Format]


@dataclass(frozen=True)
class Interactions:
    """The loss of a plan as a quadratic form of the errors of all its weights.

    A backward run projects the gradient of one loss on the error of every weight. Half the mean
    square of the *sum* of these projections is the loss of all errors together, as that of one
    projection is the loss of one: what errors do to each other costs no further run.

    Attributes:
        projections: Name of the weight -> format -> a number for each draw, float64 ``[draws]``,
            scaled so that the sum of squares is a loss per token; none for 32 bits.
        rounding: Name of the weight -> format -> what rounding inputs adds, which no other layer
            changes.
    """

    projections: Mapping[str, Mapping[Format, Tensor]]
    rounding: Mapping[str, Mapping[Format, float]]

    def loss(self, plan: Choice) -> float:
        """The loss per token of a plan; weights that it does not name stay as they are.

        Raises:
            PassError: A format was not scored.
        """
        return float(self.projection(plan).square().sum()) + self.added(plan)

    def projection(self, plan: Choice) -> Tensor:
        """The projections of all errors of a plan together, float64 ``[draws]``.

        Raises:
            PassError: A format was not scored.
        """
        found = [
            _known(self.projections, name, format)
            for name, format in plan.items()
            if format.bits != 32
        ]
        return torch.stack(found).sum(0) if found else self._zeros()

    def added(self, plan: Choice) -> float:
        """What the rounding of inputs adds in a plan."""
        return sum(self.rounding.get(name, {}).get(format, 0.0) for name, format in plan.items())

    def matrix(self, choices: Sequence[Choice]) -> Tensor:
        """Joint losses of parts of plans, float64 ``[choices, choices]``, symmetric.

        The loss of some of them together is the sum of the entries of their rows and columns.

        Args:
            choices: Parts of plans, such as a format for the members of one group.
        """
        found = self._stacked(choices)
        return found @ found.t() + self._added(choices)

    def trusted_matrix(self, choices: Sequence[Choice], owners: Tensor) -> Tensor:
        """As `matrix`, with the entries between two owners shrunk by what is noise in them.

        With few draws most of what two projections seem to have in common is chance, and the
        best of many plans is the one that chance favors. All entries are shrunk by one factor,
        ``1 - sum Var(r) / sum r^2`` over their correlations r: close to 1 where errors really
        work together, close to 0 where they do not.

        Args:
            choices: As for `matrix`.
            owners: int64, ``[choices]``; what has one owner is never chosen together.

        References:
            [Schafer2005], section 2.3, target D.
        """
        found = self._stacked(choices)
        products = found @ found.t()
        sizes = products.diag().clamp(min=1e-300).sqrt()
        correlations = products / sizes / sizes[:, None]
        draws = found.shape[1]
        scaled = (found / sizes[:, None]).square() * draws
        spread = (scaled @ scaled.t() / draws - correlations.square()) / draws
        others = owners[:, None] != owners
        common = float(correlations[others].square().sum())
        kept = 1.0 - min(1.0, float(spread[others].sum()) / common) if common else 0.0
        return torch.where(others, products * kept, products) + self._added(choices)

    def _stacked(self, choices: Sequence[Choice]) -> Tensor:
        return torch.stack([self.projection(choice) for choice in choices])

    def _added(self, choices: Sequence[Choice]) -> Tensor:
        return torch.tensor([self.added(one) for one in choices], dtype=torch.float64).diag()

    def _zeros(self) -> Tensor:
        known = [tensor for formats in self.projections.values() for tensor in formats.values()]
        return torch.zeros_like(known[0]) if known else torch.zeros(1, dtype=torch.float64)


def _known(projections: Mapping[str, Mapping[Format, Tensor]], name: str, format: Format) -> Tensor:
    if format not in projections.get(name, {}):
        raise PassError(f"the score has no loss for {name} in {format}")
    return projections[name][format]
