"""Which parts of a stream go: by a list, by a score, or evenly spaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from lamella.errors import PassError
from lamella.ir.graph import Graph
from lamella.ir.stream import Block, Sublayer
from lamella.passes.base import Analyses
from lamella.passes.scores.base import Score

Part = TypeVar("Part", Block, Sublayer)


def check_options(
    what: str, count: int | None, listed: Sequence[object], ends: Sequence[int]
) -> None:
    """Refuse options that don't say which parts go, or how many.

    Args:
        what: ``"blocks"`` or ``"sublayers"``, also the name of the option that lists them.
        count: How many go.
        listed: Which ones go.
        ends: `keep_first` and `keep_last`.

    Raises:
        ValueError: Both or neither are given, or a number is out of range.
    """
    if (count is None) == (len(listed) == 0):
        raise ValueError(f"say either how many {what} go (count=2) or which ({what}=3-7)")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if min(ends) < 0:
        raise ValueError(
            f"keep_first and keep_last must not be negative, got {' and '.join(map(str, ends))}"
        )


def by_score(
    parts: Sequence[Part], count: int, analyses: Analyses, score: Score, what: str
) -> list[Part]:
    """The `count` least important parts by `score`, noted in the report.

    Raises:
        PassError: There are fewer that may go.
    """
    check_count(parts, count, what)
    report = analyses.get(score)
    chosen = lowest(parts, report.order(), count, what)
    listed = ", ".join(f"{part.name} ({report.values[part.name]:.4g})" for part in chosen)
    analyses.note(f"by {report.by} [{report.unit}]: {listed}")
    return chosen


def by_index(parts: Sequence[Part], wanted: Sequence[int], what: str) -> list[Part]:
    """The parts with these indices.

    Raises:
        PassError: An index is out of range, or a part can't be dropped; all are listed.
    """
    strange = [index for index in wanted if index >= len(parts)]
    if strange:
        raise PassError(
            f"there is no {what} {', '.join(map(str, strange))}: the graph has {len(parts)}, "
            f"counted from 0"
        )
    chosen = [parts[index] for index in wanted]
    fixed = [f"{part.index} ({part.name})" for part in chosen if not part.droppable]
    if fixed:
        raise PassError(
            f"{what} {', '.join(fixed)} can't be dropped: the stream has another shape behind it"
        )
    return chosen


def interior(graph: Graph, first: int, last: int) -> list[Block]:
    """The droppable blocks without the first and last ones of every stream."""
    found: list[Block] = []
    for stack in stacks(graph.blocks):
        found += stack[first : max(len(stack) - last, first)]
    return [block for block in found if block.droppable]


def stacks(blocks: Sequence[Block]) -> list[list[Block]]:
    """The blocks of each stream of the graph."""
    found: dict[int, list[Block]] = {}
    for block in blocks:
        found.setdefault(block.sublayers[0].spine, []).append(block)
    return list(found.values())


def lowest(parts: Sequence[Part], order: Sequence[str], count: int, what: str) -> list[Part]:
    """The `count` parts that come first in `order`, in the order of the stream.

    Raises:
        PassError: There are fewer that may go.
    """
    check_count(parts, count, what)
    by_name: Mapping[str, Part] = {part.name: part for part in parts}
    chosen = [by_name[name] for name in order if name in by_name][:count]
    return sorted(chosen, key=lambda part: part.index)


def evenly(blocks: Sequence[Block], count: int) -> list[Block]:
    """`count` of `blocks` (one whole stream) so that those that stay are evenly spaced.

    With n blocks of which k stay, block ``round(i (n - 1) / (k - 1))`` stays for
    ``i = 0 … k - 1``: the first and the last among them.

    Raises:
        PassError: Fewer than two blocks would stay, or a block can't be dropped.

    References:
        [Liu2024].
    """
    total, left = len(blocks), len(blocks) - count
    if left < 2:
        raise PassError(
            f"even spacing keeps the first and the last block: at most {max(total - 2, 0)} of "
            f"{total} can go, not {count}"
        )
    # Half rounds up: round() would send neighbouring halves to the same block.
    stay = {(2 * place * (total - 1) + left - 1) // (2 * (left - 1)) for place in range(left)}
    places = [place for place in range(total) if place not in stay]
    return by_index(blocks, places, "block")


def check_count(parts: Sequence[object], count: int, what: str) -> None:
    """Refuse to drop more parts than there are.

    Raises:
        PassError: There are fewer than `count`.
    """
    if len(parts) < count:
        raise PassError(
            f"{count} {what} can't go: {len(parts)} may be dropped (the others are protected by "
            f"keep_first and keep_last, or change the shape of the stream)"
        )
