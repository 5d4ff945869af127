"""Activations of one block at a time: forwards of blocks that run again in the sweep.

The forward keeps what enters a block; when the sweep comes to the block, its operations run once
more, and rules read their results. Backends that merge equal operations (ONNX Runtime, inductor)
undo it: it is for running the graph in PyTorch.

References:
    [Chen2016], section 4.1, with one checkpoint for each block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node
from torch.fx.node import map_arg

from lamella.errors import GraphError
from lamella.ir.stream import Block
from lamella.passes.relevance.traced import Recorder


@dataclass
class Checkpoints:
    """Writes the forward of a block once more, when the sweep comes to it.

    Attributes:
        recorder: Writes the nodes, and knows what stands for a node from then on.
        block_of: Node -> its block, without the exits of blocks, which are kept.
    """

    recorder: Recorder
    block_of: dict[Node, Block]
    _done: set[int] = field(default_factory=set[int])

    @classmethod
    def of_blocks(cls, recorder: Recorder) -> Checkpoints:
        """One for each block of the graph.

        Raises:
            GraphError: There are no blocks.
        """
        blocks = recorder.graph.blocks
        if not blocks:
            raise GraphError(
                "the model has no blocks with a residual connection whose activations could be "
                "computed again; leave out checkpoint='blocks'"
            )
        kept = {block.exit for block in blocks} | {block.entry for block in blocks}
        found = {
            node: block
            for block in blocks
            for node in block.nodes
            if node.op == "call_function" and node not in kept
        }
        return cls(recorder, found)

    def enter(self, node: Node) -> None:
        """Run the block of `node` again, if it has one and this did not happen before."""
        block = self.block_of.get(node)
        if block is None or block.index in self._done:
            return
        self._done.add(block.index)
        standing = self.recorder.standing
        for one in self.recorder.graph.nodes:
            if self.block_of.get(one) is block:
                standing[one] = self._again(one)

    def _again(self, node: Node) -> Node:
        standing, graph = self.recorder.standing, self.recorder.graph
        args = map_arg(node.args, lambda one: standing.get(one, one))
        kwargs = map_arg(node.kwargs, lambda one: standing.get(one, one))
        assert callable(node.target)
        return graph.call(node.target, *args, before=graph.output, like=node, **kwargs)  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType, reportCallIssue]
