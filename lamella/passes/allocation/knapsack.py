"""The multiple-choice knapsack: one option of each group, least loss within all budgets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lamella.errors import BudgetError

Groups = Sequence[Sequence["Option"]]


@dataclass(frozen=True)
class Option:
    """One way to store a group of weights.

    Attributes:
        loss: What it costs in quality; losses of groups add up.
        price: What it costs of the first budget, for example in bytes.
        more: What it costs of further budgets, in their order.
    """

    loss: float
    price: int
    more: tuple[int, ...] = ()

    @property
    def prices(self) -> tuple[int, ...]:
        """What it costs of every budget."""
        return (self.price, *self.more)


def cheapest(groups: Groups, budget: int = 0) -> int:
    """The price of the cheapest choice, in the unit of the budget of that index."""
    return sum(min(option.prices[budget] for option in options) for options in groups)


def solve(groups: Groups, *budgets: int) -> tuple[int, ...]:
    """The index of the option to take of each group.

    Minimizes ``sum_j loss[j, f_j]`` subject to ``sum_j price[j, f_j] <= budget`` for every
    budget, exactly (an integer program without a gap). Of options with equal loss the cheaper
    one is taken.

    Args:
        groups: The options of each group; at least one each, with a price for each budget.
        budgets: In the units of the prices.

    Raises:
        BudgetError: A budget is smaller than the cheapest choice, or the budgets can't be met
            together.
        ValueError: A loss is NaN or infinite.

    References:
        [Yao2021], for the integer program.
    """
    if not all(math.isfinite(option.loss) for options in groups for option in options):
        raise ValueError("a loss of the knapsack is NaN or infinite")
    for place, budget in enumerate(budgets):
        least = cheapest(groups, place)
        if least > budget:
            raise BudgetError(f"a budget of {budget} can't be met, the smallest is {least}")
    kept = [_undominated(options) for options in groups]
    if all(len(indices) == 1 for indices in kept):
        return tuple(indices[0] for indices in kept)
    chosen = _integer_program(groups, kept, budgets)
    for place, budget in enumerate(budgets):
        spent = sum(o[i].prices[place] for o, i in zip(groups, chosen, strict=True))
        assert spent <= budget
    return chosen


def least_beside(groups: Groups, place: int, *budgets: int) -> int:
    """The least that a choice can cost of one budget while it meets the others.

    Args:
        groups: As for `solve`.
        place: Index of the budget.
        budgets: All budgets; that of `place` is not looked at.

    Raises:
        BudgetError: The others can't be met.
    """
    as_loss = [[replace(o, loss=float(o.prices[place])) for o in options] for options in groups]
    free = sum(max(option.prices[place] for option in options) for options in groups)
    rest = (*budgets[:place], free, *budgets[place + 1 :])
    chosen = solve(as_loss, *rest)
    return sum(o[i].prices[place] for o, i in zip(groups, chosen, strict=True))


def _undominated(options: Sequence[Option]) -> list[int]:
    """Options for which no other is as cheap in everything and as good, the cheapest first."""
    by_price = sorted(range(len(options)), key=lambda i: (options[i].prices, options[i].loss))
    kept: list[int] = []
    for index in by_price:
        if not any(_at_least_as_good(options[other], options[index]) for other in kept):
            kept.append(index)
    return kept


def _at_least_as_good(one: Option, other: Option) -> bool:
    cheap = all(a <= b for a, b in zip(one.prices, other.prices, strict=True))
    return cheap and one.loss <= other.loss


def _integer_program(
    groups: Groups, kept: Sequence[Sequence[int]], budgets: Sequence[int]
) -> tuple[int, ...]:
    """Solve over the undominated options."""
    rows = [[options[i] for i in k] for options, k in zip(groups, kept, strict=True)]
    gain = [[option.loss - min(o.loss for o in row) for option in row] for row in rows]
    losses = np.array(list(itertools.chain(*gain)))
    group_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    columns = np.arange(len(group_of))
    picks = csr_array((np.ones(len(columns)), (group_of, columns)))
    found = milp(
        # The solver stops at an absolute gap of 1e-6: large numbers make that exact.
        losses * (1e6 / (losses.max() or 1.0)),
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(picks, 1, 1),
            *(_within(rows, place, budget) for place, budget in enumerate(budgets)),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise BudgetError(_unsolved(found.status, found.message))
    taken = found.x > 0.5
    return tuple(
        k[int(np.flatnonzero(taken[group_of == group])[0])] for group, k in enumerate(kept)
    )


def _within(rows: Groups, place: int, budget: int) -> LinearConstraint:
    """One budget, above what the cheapest choice takes of it.

    Whole numbers without a common factor: the tolerance of the solver is absolute.
    """
    least = [min(option.prices[place] for option in row) for row in rows]
    extra = [[o.prices[place] - low for o in row] for row, low in zip(rows, least, strict=True)]
    unit = math.gcd(*itertools.chain(*extra)) or 1
    prices = np.array(list(itertools.chain(*extra))) // unit
    room = (budget - sum(least)) // unit
    return LinearConstraint(prices[None, :].astype(float), -np.inf, room)


def _unsolved(status: int, message: str) -> str:
    infeasible = 2
    if status == infeasible:
        return "each budget can be met alone, but not all of them together"
    return f"the solver found no choice: {message}"
