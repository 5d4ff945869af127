"""Bit plans: the knapsack against brute force, budgets, ties and floors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import lamella
from lamella.data import Samples
from lamella.errors import BudgetError
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, weight_bytes
from lamella.passes.allocation import anchoring
from lamella.passes.allocation.budget import Budget, Model
from lamella.passes.allocation.choices import Menu, formats_of
from lamella.passes.allocation.knapsack import Option, cheapest, solve
from lamella.passes.base import Analyses
from lamella.passes.scores import bit_score
from lamella.passes.sites import find_sites, other_weights, tie_groups
from lamella.passes.transforms.allocate_bits import AllocateBits

_TINY: dict[str, Any] = {"min_size": 0, "by": "weight-error", "embedding_min": 2, "head_min": 2}


def _run(graph: Graph, a_pass: AllocateBits, samples: Samples | None = None) -> Analyses:
    analyses = Analyses(graph, samples)
    a_pass.run(graph, analyses)
    graph.finish()
    return analyses


def _cases(seed: int) -> tuple[list[list[Option]], int]:
    draw = random.Random(seed)
    groups = [
        [
            Option(10 ** draw.uniform(-9, 0), draw.randint(1, 60) * draw.choice([1, 17, 1000]))
            for _ in range(draw.randint(1, 4))
        ]
        for _ in range(draw.randint(1, 7))
    ]
    dearest = sum(max(option.price for option in options) for options in groups)
    return groups, draw.randint(cheapest(groups), dearest)


@pytest.mark.parametrize("seed", range(60))
def test_knapsack_equals_brute_force(seed: int) -> None:
    groups, budget = _cases(seed)
    affordable = [c for c in itertools.product(*groups) if sum(o.price for o in c) <= budget]
    best = min(sum(option.loss for option in choice) for choice in affordable)
    chosen = [options[i] for options, i in zip(groups, solve(groups, budget), strict=True)]
    assert sum(option.price for option in chosen) <= budget
    # The losses span nine orders of magnitude; sums of them are exact to rounding.
    assert sum(option.loss for option in chosen) == pytest.approx(best, rel=1e-9, abs=0)


def test_more_budget_is_never_worse() -> None:
    groups, _ = _cases(7)
    dearest = sum(max(option.price for option in options) for options in groups)
    budgets = range(cheapest(groups), dearest + 1, max(1, dearest // 50))
    losses = [
        sum(options[i].loss for options, i in zip(groups, solve(groups, budget), strict=True))
        for budget in budgets
    ]
    # Equal up to the rounding of sums in the same order.
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(losses))


def test_equal_losses_take_the_cheapest() -> None:
    groups = [[Option(0.0, 30), Option(0.0, 10), Option(0.0, 20)]] * 3
    assert solve(groups, 1000) == (1, 1, 1)


def test_knapsack_refuses_what_can_not_be() -> None:
    with pytest.raises(BudgetError, match="the smallest is 30"):
        solve([[Option(1.0, 10)]] * 3, 29)
    with pytest.raises(ValueError, match="NaN"):
        solve([[Option(float("nan"), 10)]], 29)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        (4.5, 4.5, "bits"),
        ("4.5", 4.5, "bits"),
        ("3 bits", 3, "bits"),
        ("30%", 30, "percent"),
        (0.3, 30, "percent"),
        ("12MB", 12e6, "bytes"),
        ("1.5 GiB", 1.5 * 2**30, "bytes"),
        (12e6, 12e6, "bytes"),
        ("4096 bytes", 4096, "bytes"),
        ("much", None, None),
        (0, None, None),
        (-3, None, None),
    ],
)
def test_budgets_in_words(text: Any, amount: float | None, unit: str | None) -> None:
    if amount is None:
        with pytest.raises(ValueError, match="a budget is a number of bits"):
            Budget.parse(text)
        return
    found = Budget.parse(text)
    assert found.unit == unit
    # 100 * 0.3 is rounded.
    assert found.amount == pytest.approx(amount, rel=1e-12)


def test_budgets_in_bytes() -> None:
    model = Model(entries=1000, fixed=500, bytes=4500)
    assert Budget.parse(4).bytes(model) == 500
    assert Budget.parse("50%").bytes(model) == 2250 - 500
    assert Budget.parse("2kB").bytes(model) == 1500
    for text in ("4", "50%", "2kB"):
        budget = Budget.parse(text)
        again = budget.text(budget.bytes(model), model).removesuffix(" per weight")
        assert Budget.parse(again).bytes(model) >= budget.bytes(model)


@pytest.mark.parametrize("budget", [4.5, 5, 6, "30%"])
def test_the_plan_fits_and_ties_hold(budget: float | str, captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    before, edits = graph.weight_bytes(), graph.edits
    _run(graph, AllocateBits(budget=budget, **_TINY))
    sites = find_sites(graph)
    assert set(graph.plan) == {site.weight for site in sites}
    spent = sum(weight_bytes(site.shape, graph.plan[site.weight]) for site in sites)
    entries = sum(site.size for site in sites)
    if budget == "30%":
        rest = before - 4 * entries
        assert spent + rest <= 0.3 * before
    else:
        assert spent * 8 <= float(budget) * entries
    for group in tie_groups(sites):
        assert len({graph.plan[site.weight] for site in group}) == 1
    assert (graph.edits, graph.weight_bytes()) == (edits, before)


def test_predicted_loss_is_the_least_there_is(captured: Callable[[str], Graph]) -> None:
    graph = captured("vit")
    formats = [Format(bits) for bits in (2, 4, 8)]
    _run(graph, AllocateBits(budget=5, block=32, **_TINY))

    losses = Analyses(graph).get(bit_score("weight-error", formats)).losses
    sites = {site.weight: site for site in find_sites(graph)}
    entries = sum(site.size for site in sites.values())

    def total(plan: Any) -> float:
        return sum(losses[name][plan[name]] for name in plan)

    def price(plan: Any) -> int:
        return sum(weight_bytes(sites[name].shape, plan[name]) for name in plan)

    # No exchange of one group for another width within the budget is better.
    groups = tie_groups(sites.values())
    for one, two in itertools.permutations(groups, 2):
        for up, down in itertools.product(formats, repeat=2):
            other = dict(graph.plan)
            other.update({site.weight: up for site in one})
            other.update({site.weight: down for site in two})
            if price(other) * 8 <= 5 * entries:
                # The solver stops at a gap of 1e-12 of the largest loss.
                assert total(graph.plan) <= total(other) + 1e-9


def test_the_smallest_budget_is_named_and_can_be_met(captured: Callable[[str], Graph]) -> None:
    with pytest.raises(BudgetError, match="a budget of 2 bits per weight; the smallest") as caught:
        _run(captured("llama"), AllocateBits(budget=2, **_TINY))
    smallest = str(caught.value).split(" is ")[-1].removesuffix(" per weight")
    graph = captured("llama")
    _run(graph, AllocateBits(budget=smallest, **_TINY))
    assert {f.bits for f in graph.plan.values()} == {2}
    with pytest.raises(BudgetError, match=r"these choices is [0-9.]+%"):
        _run(captured("llama"), AllocateBits(budget="1%", **_TINY))


def test_floors(captured: Callable[[str], Graph]) -> None:
    graph = captured("qwen3_moe")
    options = _TINY | {"embedding_min": 8, "head_min": 4}
    _run(graph, AllocateBits(budget=5, **options))
    by_role: dict[str, set[int]] = {}
    for site in find_sites(graph):
        by_role.setdefault(site.role, set()).add(graph.plan[site.weight].bits)
    assert by_role["embedding"] == {8}
    assert by_role["router"] == {8}
    assert min(by_role["head"]) >= 4


def test_small_weights_have_no_format(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    _run(graph, AllocateBits(budget=5, **(_TINY | {"min_size": 2048})))
    sizes = {site.weight: site.size for site in find_sites(graph)}
    assert set(graph.plan) == {name for name, size in sizes.items() if size >= 2048}
    remarks = _run(captured("llama"), AllocateBits(min_size=10**6)).take_remarks()
    assert "lower min_size" in remarks[0]


@pytest.mark.parametrize("by", ["fisher", "kl", "output-error", "lim", "zd", "size", "random"])
def test_every_score_gives_a_plan(
    by: str, captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    graph = captured("llama")
    samples = Samples.of([sample_inputs("llama", seed=1)])
    analyses = _run(graph, AllocateBits(budget=5, **(_TINY | {"by": by})), samples)
    assert len(graph.plan) == len(find_sites(graph))
    assert any("predicted loss" in text for text in analyses.take_remarks())


def test_bits_go_where_they_are_needed(captured: Callable[[str], Graph]) -> None:
    """All weights but one lie on a grid of 2 bits and lose nothing: that one gets 8."""
    graph, needy = captured("llama"), "model.layers.1.mlp.down_proj.weight"
    generator = torch.Generator().manual_seed(0)
    for site in find_sites(graph):
        codes = torch.randint(0, 4, site.shape, generator=generator)
        codes[:, ::32] = 0
        if site.weight != needy:
            graph.set_weight(site.node, (codes - 2) * 0.0625)
    _run(graph, AllocateBits(budget=3, **_TINY))
    widths = {name: f.bits for name, f in graph.plan.items()}
    assert widths.pop(needy) == 8
    assert set(widths.values()) == {2}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", [3, 1, 2, 1]),
        ("gpt2", [1, 1, 1, 1]),
        ("vit", [3, 1, 1, 1]),
        ("qwen3_moe", [3, 1, 1]),
    ],
)
def test_ties_by_dataflow(
    family: str, expected: list[int], captured: Callable[[str], Graph]
) -> None:
    graph = captured(family)
    block = {n for n in graph.blocks[1].nodes if n.op == "get_attr"}
    groups = [g for g in tie_groups(find_sites(graph)) if g[0].node in block]
    assert [len(group) for group in groups] == expected


def test_roles(captured: Callable[[str], Graph]) -> None:
    roles = {site.weight: site.role for site in find_sites(captured("qwen3_moe"))}
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["lm_head.weight"] == "head"
    assert [name for name, role in roles.items() if role == "router"] == [
        f"model.layers.{index}.mlp.gate.weight" for index in range(3)
    ]
    tied = {site.weight: site for site in find_sites(captured("gpt2"))}["transformer.wte.weight"]
    assert (tied.role, len(tied.readers)) == ("head", 2)
    assert "4 axes in aten.conv2d" in " ".join(other_weights(captured("resnet")).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": (4, 7)}, "choices must be among 2, 3, 4, 5, 6, 8, 32"),
        ({"choices": ("4/48",)}, "blocks 32, 64, 128, 256"),
        ({"budget": "4, 5 MB"}, "two budgets of one kind"),
        ({"budget": "4 bits prefill"}, "only a time is of a call"),
        ({"choices": ()}, "choices must name at least one width"),
        ({"by": "fischer"}, "did you mean 'fisher'"),
        ({"scales": "int8"}, "scales must be one of float16, float32"),
        ({"block": 16}, "block must be one of"),
        ({"min_size": -1}, "must not be negative"),
        ({"budget": "a lot"}, "a budget is a number"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AllocateBits(**options)


def test_a_copy_and_a_restored_graph_keep_the_plan(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    _run(graph, AllocateBits(budget=5, **_TINY))
    assert graph.copy().plan == graph.plan
    other = captured("llama")
    other.restore(graph)
    assert other.plan == graph.plan
    torch.testing.assert_close(other.weight_bytes(), graph.weight_bytes(), rtol=0, atol=0)


def test_a_width_without_a_block_stands_for_every_block() -> None:
    assert formats_of((4, "8/64", 32), None, True, "float16") == (
        *(Format(4, block) for block in (128, 64, 32)),
        Format(8, 64),
        Format(32),
    )
    assert formats_of((4, "8/64"), 32, True, "float16") == (Format(4, 32), Format(8, 64))


@pytest.mark.parametrize("budget", [4.3, 6.1])
def test_blocks_to_choose_from_never_lose_more_than_one(
    captured: Callable[[str], Graph], budget: float
) -> None:
    found: list[float] = []
    for block in (None, 32):
        graph = captured("vit")
        _run(graph, AllocateBits(budget=budget, block=block, **_TINY))
        assert graph.plan_made is not None
        found.append(graph.plan_made.origin.predicted or 0.0)
    # The formats of the second are among those of the first, and sums are rounded alike.
    assert found[0] <= found[1] * (1 + 1e-12)


def test_a_block_that_would_be_padded_is_left_out_where_another_fits() -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in ((192, 96), (96, 100))))
    model = torch.nn.Sequential(layers, torch.nn.Linear(100, 192))
    graph = lamella.capture(model, {"input": torch.zeros(2, 192)})
    sites = {site.shape[1]: site for site in find_sites(graph)}
    menu = Menu(formats_of((2, "2/64z", "4/128", "4/64"), None, True, "float16"))
    allowed = {inputs: set(map(str, menu.allowed((site,)))) for inputs, site in sites.items()}
    assert allowed == {
        192: {"2 bits/64", "2 bits/32", "2 bits/64 with zeros", "4 bits/64"},
        96: {"2 bits/32", "2 bits/64 with zeros", "4 bits/128", "4 bits/64"},
        100: set(map(str, menu.formats)),
    }


class _Constant:
    """In the place of measured losses: always the same, and what was asked is kept."""

    unit = "relative"
    asked: ClassVar[list[Any]]

    def __init__(self, *_: Any) -> None:
        """Nothing runs."""

    def loss(self, plan: Any) -> float:
        return 1e6

    def losses_around(self, plan: Any, changes: Any) -> list[float]:
        self.asked.extend(changes)
        return [1e6] * len(changes)


def test_one_block_of_a_width_is_measured_around_a_plan(
    captured: Callable[[str], Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchoring, "Trials", _Constant)
    monkeypatch.setattr(_Constant, "asked", [], raising=False)
    graph = captured("vit")
    samples = Samples.of([{"pixel_values": torch.zeros(1, 3, 8, 8)}])
    analyses = _run(graph, AllocateBits(budget=5, **_TINY), samples)
    asked = [(frozenset(change), {f.bits for f in change.values()}) for change in _Constant.asked]
    groups = tie_groups(find_sites(graph))
    # The width that a group has is known; one trial for each of the other two.
    assert len(asked) == 2 * len(groups)
    assert len({(names, *bits) for names, bits in asked}) == len(asked)
    assert "of a width one block is measured again" in "\n".join(analyses.take_remarks())
