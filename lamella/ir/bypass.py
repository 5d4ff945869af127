"""Take sublayers and blocks off the residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

from torch.fx import Node

from lamella.errors import GraphError
from lamella.ir.graph import Graph
from lamella.ir.reach import data_inputs
from lamella.ir.stream import Sublayer


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
    """
    chosen = sorted(set(sublayers), key=lambda sublayer: sublayer.index)
    arms = Counter(sublayer.exit for sublayer in graph.stream.sublayers)
    _check(chosen, arms)
    for end, group in groupby(chosen, key=lambda sublayer: sublayer.exit):
        taken = [_take_out(graph, sublayer) for sublayer in group]
        if len(taken) == arms[end]:
            for node in taken[0].tail:
                graph.replace(node, data_inputs(node)[0])


def _check(chosen: Sequence[Sublayer], known: Counter[Node]) -> None:
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


def _take_out(graph: Graph, sublayer: Sublayer) -> Sublayer:
    """Replace the add that the branch goes into, as it is now, by its other operand."""
    for add in sublayer.adds:
        if sublayer.branch in add.args and add.users:
            left, right = add.args[:2]
            other = right if left is sublayer.branch else left
            assert isinstance(other, Node)
            graph.replace(add, other)
            break
    return sublayer
