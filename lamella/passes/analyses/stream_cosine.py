"""The cosine of the residual stream before and after a block or a branch, as requests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.reducers import MeanCosine, Reducer, State
from lamella.ir.runner import Request


@dataclass(frozen=True)
class MeanCosineOfSum(Reducer):
    """Mean over tokens of ``cos(x, x + f)``, for a branch `f` whose sum is no value of its own."""

    arity: ClassVar[int] = 2

    def add(self, state: State | None, *values: Tensor) -> State:
        """Sum of cosines and count."""
        before, branch = values
        return MeanCosine().add(state, before, before + branch)

    def result(self, state: State) -> Tensor:
        """A scalar."""
        return MeanCosine().result(state)


def block_requests(graph: Graph) -> dict[str, Request]:
    """For every block by name, the mean cosine of its entry and its exit.

    A block behind which the stream has another shape has none.
    """
    return {
        block.name: _request(MeanCosine(), block.entry, block.exit, block.nodes)
        for block in graph.blocks
        if block.droppable
    }


def sublayer_requests(graph: Graph) -> dict[str, Request]:
    """For every branch by name, the mean cosine of the stream before and after it alone.

    Branches that run in parallel and join the stream together have one exit: the stream after
    one of them alone is ``entry + branch``.
    """
    branches = [branch for branch in graph.stream.sublayers if branch.droppable]
    exits = Counter(branch.exit for branch in branches)
    return {
        branch.name: _request(MeanCosine(), branch.entry, branch.exit, branch.nodes)
        if exits[branch.exit] == 1
        else _request(MeanCosineOfSum(), branch.entry, branch.branch, branch.nodes)
        for branch in branches
    }


def channel_axis(value: Node, nodes: frozenset[Node]) -> int:
    """The axis of the channels of the stream at `value`, before or behind `nodes`.

    A stream of images ``[batch, channels, height, width]`` has them in front.
    """
    convolves = any(node.target is aten.conv2d.default for node in nodes)
    return 1 if convolves and value.meta["val"].ndim == 4 else -1


def _request(reducer: Reducer, before: Node, after: Node, nodes: frozenset[Node]) -> Request:
    return Request.of(reducer, before, after, channel_axis=channel_axis(before, nodes))
