"""Metrics of attributions against loops that follow their definitions, and what must hold."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from lamella import faithfulness as faith

WEIGHTS = torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0, -0.5, 1.0, 4.0], dtype=torch.float64)


def linear(sample):
    """A score whose exact attribution is the weight times the value."""
    return (sample * WEIGHTS).sum(1)


def to_zero(sample, gone):
    return sample.masked_fill(gone, 0.0)


def samples(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, len(WEIGHTS), generator=generator, dtype=torch.float64) + 0.1


def slow_curve(row, relevance, steps, *, descending):
    """One sample, unit by unit, as the definition says."""
    order = sorted(range(len(row)), key=lambda unit: (relevance[unit], 0), reverse=descending)
    values = []
    for step in range(steps + 1):
        gone = order[: len(row) * step // steps]
        values.append(sum(float(w * x) for u, (w, x) in enumerate(zip(WEIGHTS, row, strict=True))
                          if u not in gone))  # fmt: skip
    return values


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_curves_follow_the_definition(steps):
    sample = samples()
    relevance = torch.rand(sample.shape, generator=torch.Generator().manual_seed(1))
    found = faith.perturbation(linear, sample, relevance, to_zero, steps=steps)
    for index, row in enumerate(sample):
        for curve, descending in ((found.morf, True), (found.lerf, False)):
            want = slow_curve(row, relevance[index].tolist(), steps, descending=descending)
            # Sums in another order.
            assert curve.values[index].tolist() == pytest.approx(want, rel=1e-12)
            x = curve.removed.tolist()
            area = sum((x[i + 1] - x[i]) * (want[i] + want[i + 1]) / 2 for i in range(len(x) - 1))
            assert float(curve.area[index]) == pytest.approx(area, rel=1e-12)


def test_the_exact_attribution_is_the_best_and_its_opposite_the_worst():
    sample = samples()
    exact = sample * WEIGHTS
    best = faith.perturbation(linear, sample, exact, to_zero, steps=8)
    assert torch.equal(
        faith.perturbation(linear, sample, -exact, to_zero, steps=8).abpc, -best.abpc
    )
    others = torch.Generator().manual_seed(2)
    for _ in range(20):
        other = torch.rand(sample.shape, generator=others)
        assert bool((faith.perturbation(linear, sample, other, to_zero, steps=8).abpc
                     <= best.abpc + 1e-12).all())  # fmt: skip


def test_a_random_order_is_worth_nothing_on_average_and_the_same_for_a_seed():
    sample = samples(400)
    first, second = (
        faith.removal_curve(linear, sample, sample, to_zero, order="random", steps=8, seed=seed)
        for seed in (0, 1)
    )
    again = faith.removal_curve(linear, sample, sample, to_zero, order="random", steps=8)
    assert torch.equal(first.values, again.values)
    found = faith.bootstrap(first.area - second.area, level=0.999)
    assert found.low < 0 < found.high


def test_erasure_follows_the_definition():
    sample, exact = samples(), samples() * WEIGHTS
    found = faith.erasure(linear, sample, exact, to_zero, shares=(0.25, 0.5))
    for index, row in enumerate(sample):
        comprehensive, sufficient = [], []
        for count in (2, 4):
            top = sorted(range(8), key=lambda unit: -float(exact[index, unit]))[:count]
            parts = [float(WEIGHTS[unit] * row[unit]) for unit in range(8)]
            whole, kept = sum(parts), sum(parts[unit] for unit in top)
            comprehensive.append(kept)
            sufficient.append(whole - kept)
        assert float(found.comprehensiveness[index]) == pytest.approx(sum(comprehensive) / 2)
        assert float(found.sufficiency[index]) == pytest.approx(sum(sufficient) / 2)


def test_faithfulness_correlation_is_one_for_what_a_linear_score_does():
    sample = samples()
    exact = faith.faithfulness_correlation(linear, sample, sample * WEIGHTS, to_zero)
    # Rounding of float64 in a correlation of exact multiples.
    torch.testing.assert_close(exact, torch.ones(3, dtype=torch.float64), rtol=1e-9, atol=0)
    flat = faith.faithfulness_correlation(linear, sample, torch.ones_like(sample), to_zero)
    assert flat.abs().max() < 1e-6


def test_pearson_is_that_of_scipy():
    a, b = samples(4), samples(8)[4:]
    want = [scipy.stats.pearsonr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert faith.pearson(a, b).tolist() == pytest.approx(want, rel=1e-12)


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        values = torch.randn(50, generator=generator)
        found = faith.bootstrap(values, level=0.9, draws=400)
        hits += found.low <= 0 <= found.high
    # A binomial count of 200 tries at 0.9 stays in these bounds but once in thousands.
    assert 160 <= hits <= 196


def test_patches_and_their_removal_agree_on_places():
    images = torch.arange(2 * 1 * 4 * 6, dtype=torch.float64).reshape(2, 1, 4, 6)
    units = faith.patches_of(images, 2)
    assert units.shape == (2, 6)
    assert float(units[0, 4]) == float(images[0, 0, 2:4, 2:4].mean())
    assert float(faith.patches_of(images, 2, "max")[0, 4]) == float(images[0, 0, 2:4, 2:4].max())
    gone = torch.zeros(2, 6, dtype=torch.bool)
    gone[0, 4] = True
    out = faith.fill_patches(2, lambda x: x * 0 - 1)(images, gone)
    assert bool((out[0, 0, 2:4, 2:4] == -1).all())
    assert int((out != images).sum()) == 4


def test_tokens_are_replaced_at_their_places():
    ids = torch.tensor([[5, 6, 7]])
    gone = torch.tensor([[False, True, False]])
    assert faith.fill_tokens(0)(ids, gone).tolist() == [[5, 0, 7]]


@pytest.mark.parametrize(
    ("relevance", "says"),
    [
        (torch.ones(3, 8, 2), r"\[3, units\]"),
        (torch.ones(2, 8), r"\[3, units\]"),
        (torch.full((3, 8), math.nan), "not finite"),
    ],
)
def test_relevance_that_does_not_fit_is_refused(relevance, says):
    with pytest.raises(ValueError, match=says):
        faith.perturbation(linear, samples(), relevance, to_zero)


def test_numbers_out_of_range_are_refused():
    sample = samples()
    with pytest.raises(ValueError, match="steps"):
        faith.perturbation(linear, sample, sample, to_zero, steps=9)
    with pytest.raises(ValueError, match="shares"):
        faith.erasure(linear, sample, sample, to_zero, shares=(0.0,))
    with pytest.raises(ValueError, match="subsets"):
        faith.faithfulness_correlation(linear, sample, sample, to_zero, size=9)
    with pytest.raises(ValueError, match="tile"):
        faith.patches_of(torch.ones(1, 1, 5, 5), 2)
    with pytest.raises(ValueError, match="level"):
        faith.bootstrap(torch.ones(3), level=1.0)
    with pytest.raises(ValueError, match="order"):
        faith.removal_curve(linear, sample, sample, to_zero, order="last", steps=4)
