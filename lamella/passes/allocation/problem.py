"""Groups of weights, their formats, losses and prices: what the solver is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lamella.errors import PassError
from lamella.ir.quantize import Format
from lamella.passes.allocation.choices import Choices, Group
from lamella.passes.allocation.knapsack import Option, solve
from lamella.passes.allocation.pricing import Pricing, option

Losses = Sequence[Mapping[Format, float]]
"""For each group, what it loses in each format that it may have."""


@dataclass(frozen=True)
class Problem:
    """What weights may be stored in, and what that costs.

    Attributes:
        choices: The groups, each with the formats it may have.
        pricings: One for each budget.
        losses: In the order of `choices`.
    """

    choices: Choices
    pricings: Sequence[Pricing]
    losses: Losses

    @classmethod
    def of(
        cls,
        choices: Choices,
        pricings: Sequence[Pricing],
        scores: Mapping[str, Mapping[Format, float]],
    ) -> Problem:
        """A problem whose groups lose what their weights lose together.

        Raises:
            PassError: A weight has no score.
        """
        losses = [{f: _loss(scores, group, f) for f in formats} for group, formats in choices]
        return cls(choices, pricings, losses)

    def with_losses(self, losses: Losses) -> Problem:
        """The same choices and prices with other losses."""
        return replace(self, losses=losses)

    @property
    def options(self) -> list[list[Option]]:
        """For each group an option for each of its formats."""
        return [
            [option(losses[f], group, f, self.pricings) for f in formats]
            for (group, formats), losses in zip(self.choices, self.losses, strict=True)
        ]

    def solve(self, *rooms: int) -> Solution:
        """The best choice.

        Args:
            rooms: What may be spent of each budget; nothing means what the budgets say.

        Raises:
            BudgetError: It can't be met.
        """
        rooms = rooms or tuple(pricing.room for pricing in self.pricings)
        return Solution(self, solve(self.options, *rooms))


@dataclass(frozen=True)
class Solution:
    """A format for every group.

    Attributes:
        problem: What was solved.
        chosen: For each group the index of its format among those it may have.
    """

    problem: Problem
    chosen: tuple[int, ...]

    @property
    def options(self) -> list[Option]:
        """The options that were taken."""
        pairs = zip(self.problem.options, self.chosen, strict=True)
        return [options[index] for options, index in pairs]

    @property
    def formats(self) -> list[Format]:
        """The format of each group."""
        pairs = zip(self.problem.choices, self.chosen, strict=True)
        return [formats[index] for (_, formats), index in pairs]

    @property
    def groups(self) -> list[Group]:
        """The groups."""
        return [group for group, _ in self.problem.choices]

    @property
    def plan(self) -> dict[str, Format]:
        """Name of the weight -> format."""
        pairs = zip(self.groups, self.formats, strict=True)
        return {site.weight: format for group, format in pairs for site in group}

    @property
    def loss(self) -> float:
        """The sum over the groups."""
        return sum(option.loss for option in self.options)

    def price(self, place: int = 0) -> int:
        """What is spent of the budget of that index."""
        return sum(option.prices[place] for option in self.options)


def _loss(scores: Mapping[str, Mapping[Format, float]], group: Group, format: Format) -> float:
    missing = [site.weight for site in group if site.weight not in scores]
    if missing:
        raise PassError(f"the score has no loss for {', '.join(missing)}")
    # An estimate may come out slightly negative; no format gains from being coarse.
    return sum(max(scores[site.weight][format], 0.0) for site in group)
