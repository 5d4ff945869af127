"""The best plan where losses don't add up: a descent on the loss of all weights together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.ir.quantize import Format
from lamella.passes.allocation.problem import Losses, Problem, Solution
from lamella.passes.scores.interactions import Interactions

_MOST_OPTIONS = 3000
"""With more, tables of all pairs of changes take too much memory."""

_NARROW_FACTORS = (2.0, 4.0)
"""Descents also start from plans that avoid the cheapest formats: errors there add up to most."""

_LEAST_GAIN = 1e-9
"""Share of the loss that a step has to gain."""


def solved_together(solution: Solution, interactions: Interactions | None, *rooms: int) -> Solution:
    """A solution that loses less when all its weights are rounded at once.

    Starts from solutions for losses that add up, changes the format of one group or of two
    groups at a time, whatever gains most within the budgets, until nothing does. What groups do
    to each other is shrunk by what is chance in it (`Interactions.trusted_matrix`), so that
    without evidence the solution stays.

    Args:
        solution: For losses that add up.
        interactions: Where the score knows what weights lose together.
        rooms: What may be spent of each budget; nothing means what the budgets say.

    Returns:
        A solution whose losses tell what it loses together: that of the format of a group is
        its share of the whole (half of what it does with another group), and that of another
        format is this share and what the whole would lose more.

    References:
        [Deng2023], for the quadratic form; measured there two weights at a time.
    """
    if interactions is None or not solution.chosen:
        return solution
    count = sum(len(formats) for _, formats in solution.problem.choices)
    if count > _MOST_OPTIONS:
        return solution
    table = _Table.of(solution.problem, interactions)
    rooms = rooms or tuple(pricing.room for pricing in solution.problem.pricings)
    plans = [table.descended(start, rooms) for start in _starts(solution, rooms)]
    taken = min(plans, key=table.loss)
    shares = table.shares(taken, interactions)
    return Solution(solution.problem.with_losses(shares), table.chosen(taken))


def _starts(solution: Solution, rooms: Sequence[int]) -> list[Sequence[int]]:
    problem = solution.problem
    found: list[Sequence[int]] = [solution.chosen]
    for factor in _NARROW_FACTORS:
        losses = [
            {f: loss * (factor if f is narrowest else 1.0) for f, loss in of_group.items()}
            for of_group in problem.losses
            for narrowest in [min(of_group, key=lambda f: f.bits)]
        ]
        found.append(problem.with_losses(losses).solve(*rooms).chosen)
    return found


@dataclass(frozen=True)
class _Table:
    """All options of all groups in a row.

    Attributes:
        problem: Whose options they are.
        matrix: Joint losses of two options; between groups as far as they are trusted.
        prices: float64, ``[options, budgets]``.
        owners: The group of each option.
        first: The first option of each group.
    """

    problem: Problem
    matrix: Tensor
    prices: Tensor
    owners: Tensor
    first: Tensor

    @classmethod
    def of(cls, problem: Problem, interactions: Interactions) -> _Table:
        counts = torch.tensor([len(formats) for _, formats in problem.choices])
        owners = torch.arange(len(counts)).repeat_interleave(counts)
        prices = [option.prices for options in problem.options for option in options]
        matrix = interactions.trusted_matrix(_parts(problem), owners)
        first = counts.cumsum(0) - counts
        return cls(problem, matrix, torch.tensor(prices, dtype=torch.float64), owners, first)

    def indices(self, chosen: Sequence[int]) -> Tensor:
        """Place of the option of each group."""
        return self.first + torch.tensor(chosen)

    def chosen(self, taken: Tensor) -> tuple[int, ...]:
        """The other way round."""
        return tuple((taken - self.first).tolist())

    def loss(self, taken: Tensor) -> float:
        """Of a plan."""
        return float(self.matrix[taken][:, taken].sum())

    def changes(self, taken: Tensor) -> Tensor:
        """What the loss of a plan gains with each option instead of that of its group."""
        now = taken[self.owners]
        together = self.matrix[:, taken].sum(1)
        own = self.matrix.diag() + self.matrix[now, now]
        return 2.0 * (together - together[now] - self._with(now)) + own

    def descended(self, chosen: Sequence[int], rooms: Sequence[int]) -> Tensor:
        """Change one or two options at a time as long as it gains."""
        taken = self.indices(chosen)
        room = torch.tensor(rooms, dtype=torch.float64)
        while True:
            gains = self._pairs(taken, room - self.prices[taken].sum(0))
            place = int(gains.argmin())
            if not float(gains.flatten()[place]) < -_LEAST_GAIN * abs(self.loss(taken)):
                return taken
            taken = taken.clone()
            for option in divmod(place, len(gains)):
                taken[self.owners[option]] = option

    def shares(self, taken: Tensor, interactions: Interactions) -> Losses:
        """For each group what its options lose in a plan, as `solved_together` says."""
        parts = _parts(self.problem)
        own = interactions.matrix([parts[index] for index in taken.tolist()]).sum(1)
        changes = self.changes(taken).index_fill(0, taken, 0.0) + own[self.owners]
        values = iter(changes.tolist())
        return [{f: next(values) for f in formats} for _, formats in self.problem.choices]

    def _pairs(self, taken: Tensor, free: Tensor) -> Tensor:
        """The gain of every two options together, of one alone on the diagonal, if affordable."""
        now = taken[self.owners]
        alone = self.changes(taken)
        gains = alone[:, None] + alone
        left = self.matrix - self.matrix[now]
        gains += 2.0 * (left - left[:, now])
        more = self.prices - self.prices[now]
        affordable = (more[:, None] + more <= free).all(-1)
        gains[~affordable | (self.owners[:, None] == self.owners)] = torch.inf
        single = (more <= free).all(-1)
        gains.diagonal().copy_(torch.where(single, alone, torch.inf))
        return gains

    def _with(self, now: Tensor) -> Tensor:
        return self.matrix.gather(1, now[:, None]).squeeze(1)


def _parts(problem: Problem) -> list[dict[str, Format]]:
    return [
        {site.weight: format for site in group}
        for group, formats in problem.choices
        for format in formats
    ]
