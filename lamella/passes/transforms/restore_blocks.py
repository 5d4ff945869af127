"""Take a range of blocks from another checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import nn

from lamella.ir.graph import Graph
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.transforms.blending import blend, check_blocks, check_unchanged
from lamella.passes.transforms.checkpoint import open_checkpoint, stored_weights
from lamella.passes.transforms.indices import parse_indices


@dataclass(frozen=True)
class RestoreBlocks(Transform):
    """Give some blocks the weights they have in a second checkpoint of the same architecture.

    For a model that lost something in a few layers when it was tuned: the layers of the model
    it was tuned from come back. Weights that several blocks share, embeddings and head stay.
    The weights of `other` are read one by one. Run it before passes that fold or quantize
    weights.

    Attributes:
        other: A model folder, a safetensors file, a module, or a graph.
        blocks: Which blocks, counted from 0 over all streams: ``1,5`` or ``3-7``.

    Raises:
        ValueError: `blocks` is empty or not written like this.

    References:
        [Wortsman2022], with a ratio of 0 or 1 for each block.
    """

    name: ClassVar[str] = "restore-blocks"
    effect: ClassVar[Effect] = Effect.LOSSY

    other: str | Path | nn.Module | Graph = field(repr=False)
    blocks: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        if not parse_indices(self.blocks):
            raise ValueError("say which blocks are restored, such as blocks=3-7")

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Restore weight by weight."""
        check_unchanged(graph, self.name)
        wanted = parse_indices(self.blocks)
        check_blocks(graph, wanted)
        checkpoint = open_checkpoint(self.other, graph)
        inside = {node for index in wanted for node in graph.blocks[index].nodes}
        for node in stored_weights(graph):
            if node in inside:
                blend(graph, node, checkpoint, 1.0)
