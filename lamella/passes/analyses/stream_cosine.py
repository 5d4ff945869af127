"""The cosine of the residual stream before and after a block or a branch, as requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from lamella.ir.ops import aten
from lamella.ir.reducers import MeanCosine, Reducer, State
from lamella.ir.runner import Request
from lamella.ir.stream import Block, Sublayer


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


def block_request(block: Block) -> Request:
    """The mean cosine of the entry and the exit of a block."""
    nodes = frozenset(node for branch in block.sublayers for node in branch.nodes)
    return _request(MeanCosine(), block.entry, block.exit, nodes)


def sublayer_request(branch: Sublayer) -> Request:
    """The mean cosine of the stream before and after one branch.

    For branches that run in parallel and are summed before they join the stream, the stream
    after one of them alone is ``entry + branch``.
    """
    operands = {operand for operand in branch.add.args[:2] if isinstance(operand, Node)}
    if branch.branch in operands or branch.add is not branch.exit:
        return _request(MeanCosine(), branch.entry, branch.exit, branch.nodes)
    return _request(MeanCosineOfSum(), branch.entry, branch.branch, branch.nodes)


def _request(reducer: Reducer, before: Node, after: Node, nodes: frozenset[Node]) -> Request:
    # A stream of images [batch, channels, height, width] has its channels in front.
    convolves = any(node.target is aten.conv2d.default for node in nodes)
    axis = 1 if convolves and before.meta["val"].ndim == 4 else -1
    return Request.of(reducer, before, after, channel_axis=axis)
