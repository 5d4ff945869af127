"""Interpolate between the weights of two checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import nn

from lamella.ir.graph import Graph
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.transforms.blending import blend, check_blocks, check_unchanged
from lamella.passes.transforms.checkpoint import open_checkpoint, stored_weights
from lamella.passes.transforms.indices import parse_indices

_RATIO = re.compile(r"\s*([\d\s-]+):\s*([\d.eE+-]+)\s*")


@dataclass(frozen=True)
class BlendWeights(Transform):
    """Linear interpolation with a second checkpoint: ``(1 - r) w + r w_other``.

    Computed in float32 (float64 for float64 weights) and stored in the dtype of the graph; the
    weights of `other` are read one by one. Integer
    buffers and tables that follow from the code stay. Constants that were computed
    from parameters when the model was captured (weight norm) are interpolated as computed. Run
    it before passes that fold or quantize weights.

    Attributes:
        other: A model folder, a safetensors file, a module, or a graph, of the same
            architecture.
        ratio: How much of `other`, from 0 to 1.
        ratios: A ratio of its own for some blocks: ``0:0.2,3-5:0.8``. All other weights,
            embeddings and head among them, have `ratio`.

    Raises:
        ValueError: A ratio is outside of [0, 1] or is not written like this.

    References:
        [Wortsman2022].
    """

    name: ClassVar[str] = "blend-weights"
    effect: ClassVar[Effect] = Effect.LOSSY

    other: str | Path | nn.Module | Graph = field(repr=False)
    ratio: float = 0.5
    ratios: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        for ratio in parse_ratios(self.ratios).values():
            _check_ratio(ratio)

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Blend weight by weight."""
        check_unchanged(graph, self.name)
        by_weight = self._by_weight(graph)
        checkpoint = open_checkpoint(self.other, graph)
        for node in stored_weights(graph):
            blend(graph, node, checkpoint, by_weight.get(str(node.target), self.ratio))

    def _by_weight(self, graph: Graph) -> dict[str, float]:
        by_block = parse_ratios(self.ratios)
        check_blocks(graph, by_block)
        return {
            str(node.target): ratio
            for index, ratio in by_block.items()
            for node in graph.blocks[index].nodes
            if node.op == "get_attr"
        }


def parse_ratios(items: tuple[str, ...]) -> dict[int, float]:
    """``("0:0.2", "3-5:0.8")`` as a ratio per block.

    Raises:
        ValueError: An item is not written like this, or a block has two ratios.
    """
    found: dict[int, float] = {}
    for item in items:
        match = _RATIO.fullmatch(str(item))
        if match is None:
            raise ValueError(f"expected block:ratio such as 0:0.2 or 3-5:0.8, got {item!r}")
        for index in parse_indices([match[1].strip()]):
            if index in found:
                raise ValueError(f"block {index} has two ratios")
            found[index] = float(match[2])
    return found


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"a ratio must be in [0, 1], got {ratio}")
