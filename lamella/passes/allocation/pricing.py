"""What weights in a format cost against a budget: bytes, or measured time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lamella.errors import BudgetError
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, weight_bytes
from lamella.passes.allocation.budget import Budget, Model
from lamella.passes.allocation.knapsack import Option, cheapest
from lamella.passes.products import Product, kernels_of, products_of
from lamella.passes.sites import Site
from lamella.passes.times import Times, Workload

Group = tuple[Site, ...]
Choices = Sequence[tuple[Group, tuple[Format, ...]]]

TICK_SECONDS = 1e-7
"""Unit of prices in time: finer than what can be measured, and whole numbers for the solver."""


@dataclass(frozen=True)
class Pricing:
    """Prices of groups of weights, whole numbers that add up.

    Attributes:
        price: The price of a group in a format.
        room: The most that all groups together may cost; may be negative.
        total: The price of all groups in the unit of the budget, with the rest of the model.
        one: The price of one group, for a table.
        rest: What else to say of the whole.
    """

    price: Callable[[Group, Format], int]
    room: int
    total: Callable[[int], str]
    one: Callable[[int], str]
    rest: str = ""


def price_in_bytes(budget: Budget, model: Model) -> Pricing:
    """Prices are bytes of codes, scales and zeros."""
    return Pricing(
        bytes_of,
        budget.bytes(model),
        lambda price: budget.text(price, model),
        lambda price: f"{price:>12} bytes",
    )


def bytes_of(group: Group, format: Format) -> int:
    """Bytes of a group of weights in a format."""
    return sum(weight_bytes(site.shape, format, site.dtype) for site in group)


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
        lambda group, format: prices[group, format],
        int((budget.seconds - other) / TICK_SECONDS),
        lambda price: budget.text_of_seconds(other + price * TICK_SECONDS),
        lambda price: f"{price * TICK_SECONDS * 1e6:>10.1f} µs",
        f"; predicted for {workload}, {other * 1e3:.4g} ms of it without these weights",
    )


def check(budget: Budget, pricing: Pricing, choices: Choices) -> None:
    """Refuse a budget that can't be met before anything is scored.

    Raises:
        BudgetError: It names the smallest that can.
    """
    prices = [[Option(0.0, pricing.price(group, f)) for f in formats] for group, formats in choices]
    least = cheapest(prices)
    if least > pricing.room:
        raise BudgetError(
            f"allocate-bits can't meet a budget of {budget}; the smallest that can be met with "
            f"these choices is {pricing.total(least)}"
        )


def _of_group(products: Sequence[Product], group: Group) -> list[Product]:
    names = {site.weight for site in group}
    return [product for product in products if product.weight in names]


def _alike(group: Group, format: Format) -> dict[str, Format]:
    return {site.weight: format for site in group}
