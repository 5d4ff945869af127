"""What was decided for every group of weights, and what the next step down would cost."""

from __future__ import annotations

from lamella.passes.allocation.knapsack import Option
from lamella.passes.allocation.problem import Solution


def summary_of(solution: Solution, size: int) -> str:
    """One sentence about the whole.

    Args:
        solution: What was chosen.
        size: Bytes of the whole model afterwards.
    """
    widths = [
        format.bits
        for group, format in zip(solution.groups, solution.formats, strict=True)
        for _ in group
    ]
    counts = ", ".join(f"{widths.count(bits)} at {bits} bits" for bits in sorted(set(widths)))
    spent = [
        f"{pricing.total(solution.price(place))}{pricing.rest}"
        for place, pricing in enumerate(solution.problem.pricings)
    ]
    return (
        f"{len(widths)} weights, {counts}: {', '.join(spent)}, {size} bytes with the rest; "
        f"predicted loss {solution.loss:.4g}"
    )


def table_of(solution: Solution) -> str:
    """A line for each group: its format, price and loss, and what a narrower one would change."""
    lines: list[str] = []
    for place, (group, format) in enumerate(zip(solution.groups, solution.formats, strict=True)):
        taken = solution.options[place]
        prices = "  ".join(
            pricing.one(price)
            for pricing, price in zip(solution.problem.pricings, taken.prices, strict=True)
        )
        names = ", ".join(site.weight for site in group)
        lines.append(f"{format}  {prices}  loss {taken.loss:.3g}{_next(solution, place)}  {names}")
    return "\n".join(lines)


def _next(solution: Solution, place: int) -> str:
    """What the next cheaper format of a group would cost and save."""
    _, formats = solution.problem.choices[place]
    options = solution.problem.options[place]
    taken = solution.options[place]
    cheaper = [i for i, option in enumerate(options) if option.price < taken.price]
    if not cheaper:
        return " (the narrowest)"
    index = min(cheaper, key=lambda i: (options[i].loss, -options[i].price))
    return f" ({formats[index]} would cost {_difference(solution, taken, options[index])})"


def _difference(solution: Solution, taken: Option, other: Option) -> str:
    first = solution.problem.pricings[0]
    saved = first.one(taken.price - other.price).strip()
    return f"{other.loss - taken.loss:+.3g} and save {saved}"
