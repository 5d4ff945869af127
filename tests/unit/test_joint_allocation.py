"""What weights lose together: against definitions, measured losses and all plans there are."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lamella.data import Samples
from lamella.errors import PassError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, dequantized
from lamella.passes.allocation.budget import Budget
from lamella.passes.allocation.joint import solved_together
from lamella.passes.allocation.pricing import pricings_of
from lamella.passes.allocation.problem import Problem
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScoreReport
from lamella.passes.scores.fisher import Fisher
from lamella.passes.scores.interactions import Interactions
from lamella.passes.sites import find_sites, tie_groups
from lamella.passes.trials import Trials

Captured = Callable[[str], Graph]
FORMATS = (Format(2), Format(4), Format(8))


def scored(analyses: Analyses, by: Fisher) -> tuple[BitScoreReport, Interactions]:
    report = analyses.get(by)
    assert report.interactions is not None
    return report, report.interactions


def drawn(graph: Graph, draws: int, seed: int) -> Interactions:
    """Projections that have something in common, and smaller ones for more bits."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(draws, generator=generator).double()
    projections = {
        site.weight: {
            f: (torch.randn(draws, generator=generator).double() + common) * 2.0**-f.bits
            for f in FORMATS
        }
        for site in find_sites(graph)
    }
    rounding = {name: dict.fromkeys(FORMATS, 1e-4) for name in projections}
    return Interactions(projections, rounding)


def problem_of(graph: Graph, interactions: Interactions, bits: float, groups: int) -> Problem:
    choices = [(group, FORMATS) for group in tie_groups(find_sites(graph))[:groups]]
    pricings = pricings_of([Budget(bits, "bits")], graph, choices, Analyses(graph), None)
    losses = {
        name: {f: interactions.loss({name: f}) for f in FORMATS}
        for name in interactions.projections
    }
    return Problem.of(choices, pricings, losses)


# ---- interactions --------------------------------------------------------------------------


def test_errors_that_cancel_lose_nothing_together():
    torch.manual_seed(0)

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(32, 5, bias=False), nn.Linear(32, 5, bias=False)
            self.two.weight.data.copy_(self.one.weight.data)
            self.head = nn.Linear(32, 5, bias=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.one(x) - self.two(x) + self.head(x)}

    graph = capture_module(Twins(), {"x": torch.randn(2, 32)})
    analyses = Analyses(graph, Samples.of([{"x": torch.randn(50, 32)}]))
    f = Format(2)
    report, together = scored(analyses, Fisher((f,), int8_activations=False, sequences=50))
    both = {"one.weight": f, "two.weight": f}
    alone = [report.losses[name][f] for name in both]
    assert alone[0] == pytest.approx(alone[1], rel=1e-6)
    assert together.loss(both) < 1e-9 * alone[0]
    # Where errors add up, twice the error is four times the loss.
    doubled = Interactions(
        {"a": together.projections["one.weight"], "b": together.projections["one.weight"]}, {}
    )
    assert doubled.loss({"a": f, "b": f}) == pytest.approx(4 * alone[0], rel=1e-9)


def test_the_joint_loss_of_two_layers_is_the_quadratic_form_of_both_errors():
    """For two layers that are added: ``1/2 (Dx)^T (diag(p) - p p^T) (Dx)``, D the sum of errors."""
    torch.manual_seed(0)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 4, bias=False), nn.Linear(64, 4, bias=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.one(x) + self.two(x)}

    model, x = Sum(), torch.randn(200, 64)
    analyses = Analyses(capture_module(model, {"x": x[:2]}), Samples.of([{"x": x}]))
    f = Format(2)
    options = Fisher((f,), int8_activations=False, sequences=200, draws=40)
    _, together = scored(analyses, options)
    with torch.no_grad():
        p = model(x)["logits"].double().softmax(1)
        weights = (model.one.weight, model.two.weight)
        error = sum(dequantized(w.detach(), f) - w for w in weights)
        change = x.double() @ error.double().T
        expected = 0.5 * ((p * change.square()).sum(1) - (p * change).sum(1).square()).mean()
    found = together.loss({"one.weight": f, "two.weight": f})
    # 8,000 draws; the squares that are averaged spread about as wide as their mean.
    assert found == pytest.approx(float(expected), rel=0.05)


def test_rows_and_columns_of_the_matrix_add_up_to_the_loss_of_a_plan(captured: Captured):
    together = drawn(captured("llama"), 12, 0)
    plan = {name: FORMATS[i % 3] for i, name in enumerate(together.projections)}
    matrix = together.matrix([{name: f} for name, f in plan.items()])
    assert float(matrix.sum()) == pytest.approx(together.loss(plan), rel=1e-12)
    assert together.loss({}) == together.loss(dict.fromkeys(plan, Format(32))) == 0.0
    with pytest.raises(PassError, match=r"no loss for model.* in 3 bits/32"):
        together.loss({"model.embed_tokens.weight": Format(3)})


def test_trust_is_one_minus_the_variance_of_correlations_over_their_squares(captured: Captured):
    together = drawn(captured("llama"), 10, 3)
    names = list(together.projections)[:4]
    choices = [{name: f} for name in names for f in FORMATS[:2]]
    owners = torch.arange(4).repeat_interleave(2)
    vectors = [together.projection(choice) for choice in choices]
    draws = len(vectors[0])
    variances, squares = 0.0, 0.0
    for (i, a), (j, b) in itertools.product(enumerate(vectors), repeat=2):
        if owners[i] != owners[j]:
            # Each draw says a correlation of its own; their mean is r.
            said = [float(draws * a[s] * b[s] / a.norm() / b.norm()) for s in range(draws)]
            r = sum(said) / draws
            variances += sum((one - r) ** 2 for one in said) / draws / draws
            squares += r * r
    kept = max(0.0, 1 - variances / squares)
    assert 0.1 < kept < 1.0
    expected = together.matrix(choices)
    others = owners[:, None] != owners
    expected[others] *= kept
    torch.testing.assert_close(together.trusted_matrix(choices, owners), expected)


def test_what_is_all_chance_is_not_trusted():
    generator = torch.Generator().manual_seed(0)
    names = [str(index) for index in range(30)]
    f = FORMATS[0]
    vectors = {name: {f: torch.randn(64, generator=generator).double()} for name in names}
    owners = torch.arange(30)
    choices = [{name: f} for name in names]
    chance = Interactions(vectors, {})
    off = ~torch.eye(30, dtype=torch.bool)
    plain, trusted = chance.matrix(choices), chance.trusted_matrix(choices, owners)
    assert float(trusted[off].abs().max()) < 0.15 * float(plain[off].abs().max())
    alike = Interactions(dict.fromkeys(names, vectors["0"]), {})
    kept = alike.trusted_matrix(choices, owners) / alike.matrix(choices)
    # All correlations are 1, and each is known to about 1 / sqrt(64) for a kurtosis of 3.
    assert float(kept.min()) > 0.9


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_joint_losses_predict_what_whole_plans_are_measured_to_lose(
    family: str, captured: Captured, sample_inputs: Callable[..., dict[str, Tensor]]
):
    graph = captured(family)
    samples = Samples.of([sample_inputs(family, 8, 16, seed) for seed in range(4)])
    _, together = scored(Analyses(graph, samples), Fisher((Format(3), Format(4))))
    trials = Trials(graph, samples)
    for bits in (3, 4):
        plan = {site.weight: Format(bits) for site in find_sites(graph)}
        # 128 draws know a square to an eighth.
        assert 0.6 < together.loss(plan) / trials.loss(plan) < 1.5


# ---- the descent ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_descent_finds_the_best_of_all_plans(seed: int, captured: Captured):
    graph = captured("llama")
    together = drawn(graph, 40, seed)
    problem = problem_of(graph, together, 4.5, 5)
    found = solved_together(problem.solve(), together)
    parts = [{s.weight: f for s in group} for group, formats in problem.choices for f in formats]
    owners = torch.arange(5).repeat_interleave(3)
    matrix = together.trusted_matrix(parts, owners)
    prices = [[option.price for option in options] for options in problem.options]

    def loss(chosen: tuple[int, ...]) -> float:
        taken = torch.tensor([3 * place + index for place, index in enumerate(chosen)])
        return float(matrix[taken][:, taken].sum())

    room = problem.pricings[0].room
    affordable = [
        chosen
        for chosen in itertools.product(range(3), repeat=5)
        if sum(row[index] for row, index in zip(prices, chosen, strict=True)) <= room
    ]
    assert found.price() <= room
    assert loss(found.chosen) <= loss(problem.solve().chosen) + 1e-15
    # Exchanges of two reach the optimum of five groups from one of three starts.
    assert loss(found.chosen) == pytest.approx(min(map(loss, affordable)), rel=1e-9)


def test_losses_of_the_solution_add_up_and_tell_what_changes_cost(captured: Captured):
    graph = captured("llama")
    together = drawn(graph, 4000, 0)
    problem = problem_of(graph, together, 4.5, 6)
    found = solved_together(problem.solve(), together)
    assert found.loss == pytest.approx(together.loss(found.plan), rel=1e-9)
    for place, (group, formats) in enumerate(problem.choices):
        losses = found.problem.losses[place]
        for f in formats:
            changed = found.plan | {site.weight: f for site in group}
            more = together.loss(changed) - together.loss(found.plan)
            told = losses[f] - losses[found.formats[place]]
            # With 4,000 draws nearly everything is trusted.
            assert told == pytest.approx(more, rel=0.05, abs=1e-3 * found.loss)


def test_without_interactions_the_solution_stays(captured: Captured):
    graph = captured("llama")
    alone = problem_of(graph, drawn(graph, 8, 0), 4.5, 6).solve()
    assert solved_together(alone, None) is alone
