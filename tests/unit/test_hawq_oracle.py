"""The published numbers of HAWQ-V3 for ResNet-18 give its published bit plans."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import pytest

from lamella.passes.allocation.knapsack import Option, cheapest, solve

# Source: github.com/Zhen-Dong/HAWQ, ILP.ipynb, commit 1616df6: the 19 layers of ResNet-18 without
# the first and the last. Facts only.
TRACE = (
    "0.06857826 0.03162379 0.03298575 0.01205663 0.02222431 0.00596336 0.06931772 0.00807129 "
    "0.00372905 0.00530698 0.00209011 0.00737569 0.00210454 0.00151197 0.00158041 0.00078146 "
    "0.00451841 0.00098745 0.00072944"
)
ERROR_8 = (
    "0.0235 0.0125 0.0102 0.0082 0.0145 0.0344 0.0023 0.0287 0.0148 0.0333 0.0682 0.0027 0.0448 "
    "0.0336 0.0576 0.1130 0.0102 0.0947 0.0532"
)
ERROR_4 = (
    "6.7430 3.9691 3.3281 2.6796 4.7277 10.5966 0.6827 9.0942 4.8857 10.7599 21.7546 0.8603 "
    "14.5324 10.9651 18.7706 36.4044 3.1572 29.6994 17.4016"
)
ENTRIES = (
    "36864 36864 36864 36864 73728 147456 8192 147456 147456 294912 589824 32768 589824 589824 "
    "1179648 2359296 131072 2359296 2359296"
)
# Milliseconds on a T4.
TIME_4 = (
    "0.21094404 0.21092674 0.21104113 0.21086851 0.13642465 0.19167506 0.02532183 0.19148203 "
    "0.19142914 0.11395316 0.20556011 0.01917474 0.20566918 0.20566509 0.13185102 0.22287786 "
    "0.01790088 0.22304611 0.22286099"
)
TIME_8 = (
    "0.36189111 0.36211718 0.31141909 0.30454471 0.19184896 0.38948934 0.0334169 0.38904905 "
    "0.3892859 0.19134735 0.34307431 0.02802354 0.34313329 0.34310756 0.21117103 0.37376585 "
    "0.02896843 0.37398187 0.37405185"
)
TIED = ((4, 6), (9, 11), (14, 16))
TICK = 10**8


def _numbers(text: str) -> list[Fraction]:
    return [Fraction(word) for word in text.split()]


def _options(prices: Sequence[tuple[int, int]]) -> tuple[list[list[Option]], list[list[int]]]:
    """A group for every layer that is not tied, with 4 and 8 bits."""
    losses = [
        (float(trace * four), float(trace * eight))
        for trace, four, eight in zip(
            _numbers(TRACE), _numbers(ERROR_4), _numbers(ERROR_8), strict=True
        )
    ]
    second = dict(TIED)
    members = [
        [i, second[i]] if i in second else [i]
        for i in range(len(losses))
        if i not in second.values()
    ]
    groups = [
        [
            Option(sum(losses[i][bits] for i in m), sum(prices[i][bits] for i in m))
            for bits in (0, 1)
        ]
        for m in members
    ]
    return groups, members


def _four_bits(prices: Sequence[tuple[int, int]], share: Fraction) -> tuple[set[int], float]:
    groups, members = _options(prices)
    least, most = cheapest(groups), sum(options[1].price for options in groups)
    chosen = solve(groups, int(least + share * (most - least)))
    four = {i for m, bits in zip(members, chosen, strict=True) for i in m if bits == 0}
    return four, sum(options[bits].loss for options, bits in zip(groups, chosen, strict=True))


def _sizes() -> list[tuple[int, int]]:
    return [(int(n) // 2, int(n)) for n in _numbers(ENTRIES)]


def _times() -> list[tuple[int, int]]:
    pairs = zip(_numbers(TIME_4), _numbers(TIME_8), strict=True)
    return [(int(four * TICK), int(eight * TICK)) for four, eight in pairs]


def test_half_of_the_size_between_4_and_8_bits() -> None:
    four, loss = _four_bits(_sizes(), Fraction(1, 2))
    assert four == {15, 17, 18}
    # As the notebook's objective, all numbers of which have four to eight digits.
    assert loss == pytest.approx(0.07451, abs=5e-6)
    stored = sum(pair[i not in four] for i, pair in enumerate(_sizes()))
    assert stored / 2**20 == pytest.approx(7.266, abs=5e-4)


def test_half_of_the_time_between_4_and_8_bits() -> None:
    four, loss = _four_bits(_times(), Fraction(1, 2))
    assert four == {5, 8, 12, 13, 15, 17, 18}
    assert loss == pytest.approx(0.20267, abs=5e-6)


@pytest.mark.parametrize("share", [Fraction(1, 4), Fraction(3, 4)])
def test_other_shares_equal_all_plans_tried(share: Fraction) -> None:
    prices = _sizes()
    groups, _ = _options(prices)
    least, most = cheapest(groups), sum(options[1].price for options in groups)
    room = int(least + share * (most - least))
    affordable = (
        sum(o[b].loss for o, b in zip(groups, bits, strict=True))
        for bits in itertools.product((0, 1), repeat=len(groups))
        if sum(o[b].price for o, b in zip(groups, bits, strict=True)) <= room
    )
    # The same sums in the same order.
    assert _four_bits(prices, share)[1] == pytest.approx(min(affordable), rel=1e-12)
