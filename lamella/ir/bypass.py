"""Take sublayers and blocks off the residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from torch.fx import Node

from lamella.errors import GraphError
from lamella.ir.stream import Sublayer

if TYPE_CHECKING:
    from lamella.ir.graph import Graph


def bypass(graph: Graph, sublayers: Iterable[Sublayer]) -> None:
    """Let the stream run past `sublayers`; their operators are dead afterwards.

    The add is replaced by its other operand, and the norm or activation that always follows
    the add (post-norm) goes with it. Where arms of a parallel block share one exit, it goes
    when all of them go. Several sublayers, or all, may be given at once. Call `Graph.finish`
    afterwards; values that are read outside of a branch (``Sublayer.side_outputs``) stay alive.

    Args:
        graph: Is edited.
        sublayers: Of ``graph.stream`` as it is now, before any of the edits.

    Raises:
        GraphError: A sublayer can't be dropped (projected shortcut), or is not of this graph.

    References:
        `methods/structure.md`, section 1.3.
    """
    chosen = sorted(set(sublayers), key=lambda sublayer: sublayer.index)
    known = {sublayer.exit: 0 for sublayer in graph.stream.sublayers}
    for sublayer in graph.stream.sublayers:
        known[sublayer.exit] += 1
    _check(chosen, known)
    for end, arms in groupby(chosen, key=lambda sublayer: sublayer.exit):
        group = list(arms)
        before = _take_out(graph, group)
        if len(group) == known[end] and end is not group[-1].adds[-1]:
            graph.replace(end, before)


def _check(chosen: Sequence[Sublayer], known: dict[Node, int]) -> None:
    strange = [sublayer.name for sublayer in chosen if sublayer.exit not in known]
    if strange:
        raise GraphError(
            f"{', '.join(strange)} are not sublayers of this graph as it is now; "
            f"take them from graph.stream after the last edit"
        )
    fixed = [sublayer.name for sublayer in chosen if not sublayer.droppable]
    if fixed:
        raise GraphError(
            f"{', '.join(fixed)} can't be dropped: the shortcut beside them changes the "
            f"width or the size of the stream"
        )


def _take_out(graph: Graph, arms: Sequence[Sublayer]) -> Node:
    """Remove the branches of one residual add; returns the stream where they were added."""
    value = arms[0].entry
    for arm in arms:
        for add in arm.adds:
            if arm.branch in add.args:
                left, right = add.args[:2]
                other = right if left is arm.branch else left
                assert isinstance(other, Node)
                graph.replace(add, other)
                value = other
                break
    return value
