"""The multiple-choice knapsack: one option of each group, least loss within a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lamella.errors import BudgetError


@dataclass(frozen=True)
class Option:
    """One way to store a group of weights.

    Attributes:
        loss: What it costs in quality; losses of groups add up.
        price: What it costs in bytes.
    """

    loss: float
    price: int


def cheapest(groups: Sequence[Sequence[Option]]) -> int:
    """The price of the cheapest choice."""
    return sum(min(option.price for option in options) for options in groups)


def solve(groups: Sequence[Sequence[Option]], budget: int) -> tuple[int, ...]:
    """The index of the option to take of each group.

    Minimizes ``sum_j loss[j, f_j]`` subject to ``sum_j price[j, f_j] <= budget``, exactly (an
    integer program without a gap). Of options with equal loss the cheaper one is taken.

    Args:
        groups: The options of each group; at least one each.
        budget: In the unit of the prices.

    Raises:
        BudgetError: Even the cheapest choice is too expensive.
        ValueError: A loss is NaN or infinite.

    References:
        [Yao2021], for the integer program.
    """
    if not all(math.isfinite(option.loss) for options in groups for option in options):
        raise ValueError("a loss of the knapsack is NaN or infinite")
    least = cheapest(groups)
    if least > budget:
        raise BudgetError(f"a budget of {budget} bytes can't be met, the smallest is {least} bytes")
    kept = [_undominated(options) for options in groups]
    if all(len(indices) == 1 for indices in kept):
        return tuple(indices[0] for indices in kept)
    chosen = _integer_program(groups, kept, budget - least)
    assert sum(o[i].price for o, i in zip(groups, chosen, strict=True)) <= budget
    return chosen


def _undominated(options: Sequence[Option]) -> list[int]:
    """Options for which no other is as cheap and as good, the cheapest first."""
    by_price = sorted(range(len(options)), key=lambda i: (options[i].price, options[i].loss))
    kept: list[int] = []
    for index in by_price:
        if not kept or options[index].loss < options[kept[-1]].loss:
            kept.append(index)
    return kept


def _integer_program(
    groups: Sequence[Sequence[Option]], kept: Sequence[Sequence[int]], room: int
) -> tuple[int, ...]:
    """Solve over the undominated options; `room` is what is left after the cheapest choice."""
    pairs = list(zip(groups, kept, strict=True))
    extra = [[options[i].price - options[k[0]].price for i in k] for options, k in pairs]
    gain = [[options[i].loss - options[k[-1]].loss for i in k] for options, k in pairs]
    # Whole numbers without a common factor: the solver's tolerance is absolute.
    unit = math.gcd(*itertools.chain(*extra)) or 1
    prices = np.array(list(itertools.chain(*extra))) // unit
    losses = np.array(list(itertools.chain(*gain)))
    group_of = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
    columns = np.arange(len(group_of))
    picks = csr_array((np.ones(len(columns)), (group_of, columns)))
    found = milp(
        # The solver stops at an absolute gap of 1e-6: large numbers make that exact.
        losses * (1e6 / (losses.max() or 1.0)),
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(picks, 1, 1),
            LinearConstraint(prices[None, :].astype(float), -np.inf, room // unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise BudgetError(f"the solver found no choice: {found.message}")
    taken = found.x > 0.5
    return tuple(
        k[int(np.flatnonzero(taken[group_of == group])[0])] for group, k in enumerate(kept)
    )
