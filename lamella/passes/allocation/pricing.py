"""What weights in a format cost against a budget: bytes, or measured time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lamella.errors import BudgetError
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, weight_bytes
from lamella.passes.allocation.budget import Budget, Model
from lamella.passes.allocation.choices import Choices, Group
from lamella.passes.allocation.knapsack import Option, cheapest, least_beside, solve
from lamella.passes.base import Analyses
from lamella.passes.products import Product, kernels_of, products_of
from lamella.passes.sites import Site
from lamella.passes.times import PROMPT, Times, Workload, generates, needed

TICK_SECONDS = 1e-7
"""Unit of prices in time: finer than what can be measured, and whole numbers for the solver."""


@dataclass(frozen=True)
class Pricing:
    """Prices of groups of weights, whole numbers that add up.

    Attributes:
        budget: The budget.
        price: The price of a group in a format.
        room: The most that all groups together may cost; may be negative.
        total: The price of all groups in the unit of the budget, with the rest of the model.
        one: The price of one group, for a table.
        rest: What else to say of the whole.
    """

    budget: Budget
    price: Callable[[Group, Format], int]
    room: int
    total: Callable[[int], str]
    one: Callable[[int], str]
    rest: str = ""


def pricings_of(
    budgets: Sequence[Budget], graph: Graph, choices: Choices, analyses: Analyses, call: Workload
) -> tuple[Pricing, ...]:
    """The prices against each budget; what is measured for them goes into the report.

    Args:
        budgets: Of different kinds.
        graph: The graph.
        choices: The groups with the formats they may have.
        analyses: Knows the times of kernels.
        call: What a time is of, where its budget doesn't say.

    Raises:
        PassError: A budget is a time, and there are no measured times.
        ValueError: A budget is for a phase that the model doesn't have.
    """
    model = model_of(graph, [site for group, _ in choices for site in group])
    found: list[Pricing] = []
    for budget in budgets:
        if budget.unit != "seconds":
            found.append(price_in_bytes(budget, model))
            continue
        times = needed(analyses.times, "a budget in milliseconds")
        workload = _workload(budget, graph, call)
        found.append(price_in_time(budget, graph, choices, times, workload))
        for text in times.take_notes():
            analyses.note(text)
        for text in times.take_problems():
            analyses.remark(text)
    return tuple(found)


def price_in_bytes(budget: Budget, model: Model) -> Pricing:
    """Prices are bytes of codes, scales and zeros."""
    return Pricing(
        budget,
        bytes_of,
        budget.bytes(model),
        lambda price: budget.text(price, model),
        lambda price: f"{price:>12} bytes",
    )


def bytes_of(group: Group, format: Format) -> int:
    """Bytes of a group of weights in a format."""
    return sum(weight_bytes(site.shape, format, site.dtype) for site in group)


def model_of(graph: Graph, sites: Sequence[Site]) -> Model:
    """What a budget in bytes is about, where `sites` get a format."""
    total = graph.weight_bytes()
    now = sum(site.size * site.dtype.itemsize for site in sites)
    return Model(sum(site.size for site in sites), total - now, total)


def price_in_time(
    budget: Budget, graph: Graph, choices: Choices, times: Times, workload: Workload
) -> Pricing:
    """Prices are measured times of the kernels that read a group, in `TICK_SECONDS`.

    All kernels are asked for at once, so that they are measured in turns. Embeddings, of which a
    call reads a row for each token, are part of the rest.
    """
    products = products_of(graph, workload, times)
    merged = times.merges and workload.past is not None
    priced = {site.weight for group, _ in choices for site in group}
    fixed = kernels_of((p for p in products if p.weight not in priced), merged)
    counts = {
        (group, format): kernels_of(_of_group(products, group), merged, _alike(group, format))
        for group, formats in choices
        for format in formats
    }
    known = times.seconds([k for several in (fixed, *counts.values()) for k in several])
    prices = {
        key: round(sum(n * known[kernel] for kernel, n in several.items()) / TICK_SECONDS)
        for key, several in counts.items()
    }
    other = times.rest(graph, workload) + sum(n * known[k] for k, n in fixed.items())
    return Pricing(
        budget,
        lambda group, format: prices[group, format],
        int((budget.seconds - other) / TICK_SECONDS),
        lambda price: budget.text_of_seconds(other + price * TICK_SECONDS),
        lambda price: f"{price * TICK_SECONDS * 1e6:>10.1f} µs",
        f"; predicted for {workload}, {other * 1e3:.4g} ms of it without these weights",
    )


def check(pricings: Sequence[Pricing], choices: Choices) -> None:
    """Refuse budgets that can't be met before anything is scored.

    Raises:
        BudgetError: It names the smallest that can; of several that can't be met together, the
            smallest of each beside the others.
    """
    groups = [[option(0.0, group, f, pricings) for f in formats] for group, formats in choices]
    for place, pricing in enumerate(pricings):
        least = cheapest(groups, place)
        if least > pricing.room:
            raise BudgetError(
                f"allocate-bits can't meet a budget of {pricing.budget}; the smallest that can be "
                f"met with these choices is {pricing.total(least)}"
            )
    rooms = [pricing.room for pricing in pricings]
    try:
        solve(groups, *rooms)
    except BudgetError as error:
        beside = (least_beside(groups, place, *rooms) for place in range(len(rooms)))
        listed = " or ".join(p.total(least) for p, least in zip(pricings, beside, strict=True))
        raise BudgetError(
            f"allocate-bits can't meet {' and '.join(str(p.budget) for p in pricings)} together; "
            f"raise one of them to {listed}"
        ) from error


def option(loss: float, group: Group, format: Format, pricings: Sequence[Pricing]) -> Option:
    """A group in a format, with its loss and all its prices."""
    price, *more = (pricing.price(group, format) for pricing in pricings)
    return Option(loss, price, tuple(more))


def _workload(budget: Budget, graph: Graph, call: Workload) -> Workload:
    if not budget.phase:
        return call
    if not generates(graph):
        raise ValueError(
            f"a budget of {budget} is for a model that generates, this one has no cache; leave "
            f"{budget.phase!r} out"
        )
    if budget.phase == "decode":
        past = call.past or Workload.of(graph).past
        return replace(call, batch=1, tokens=1, past=budget.tokens or past)
    return Workload(1, budget.tokens or Workload.of(graph, past=0).tokens or PROMPT, 0)


def _of_group(products: Sequence[Product], group: Group) -> list[Product]:
    names = {site.weight for site in group}
    return [product for product in products if product.weight in names]


def _alike(group: Group, format: Format) -> dict[str, Format]:
    return {site.weight: format for site in group}
