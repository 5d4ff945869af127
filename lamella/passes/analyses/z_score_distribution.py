"""How many weights of every block stand out of the distribution of its weights."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.stream import Block, Sublayer
from lamella.passes.base import Analyses, Analysis


@dataclass(frozen=True)
class ZScoreDistributionReport:
    """Scores of `ZScoreDistribution`, shares in [0, 1]; smaller means more important.

    Attributes:
        blocks: Name of the block -> share.
        sublayers: Name of the branch -> share.
        weights: Name of the weight -> share, each against its own mean and deviation.
    """

    blocks: Mapping[str, float]
    sublayers: Mapping[str, float]
    weights: Mapping[str, float]


@dataclass(frozen=True)
class ZScoreDistribution(Analysis[ZScoreDistributionReport]):
    """The ZD score: the share of weights with ``(w - mean) / std > 1``. No data is needed.

    The mean and the (population) deviation are those of all weights of the block together, as
    in the paper. Vectors (norms, biases) and the embedding are no part of a block's score.
    Weights are read one by one, twice. The options are the forms that ports of the paper use.

    Attributes:
        both_sides: Count ``|w - mean| / std`` instead: weights far below the mean too.
        threshold: How many deviations.
        pooled: One mean and deviation for all weights of the block; otherwise each matrix has its
            own, and the score is the mean of the shares of the matrices.

    Raises:
        ValueError: `threshold` is not positive.

    References:
        [Dumitru2024], equation 2.
    """

    name: ClassVar[str] = "z-score-distribution"

    both_sides: bool = False
    threshold: float = 1.0
    pooled: bool = True

    def __post_init__(self) -> None:
        if not self.threshold > 0.0:
            raise ValueError(f"threshold must be positive, got {self.threshold}")

    def run(self, graph: Graph, analyses: Analyses) -> ZScoreDistributionReport:
        """Read the weights of one block at a time."""
        blocks = {b.name: self._score(graph, _matrices_of_block(b)) for b in graph.blocks}
        sublayers = {s.name: self._score(graph, _matrices(s)) for s in graph.stream.sublayers}
        named = dict.fromkeys(m for s in graph.stream.sublayers for m in _matrices(s))
        weights = {str(node.target): self._share(graph, [node]) for node in named}
        return ZScoreDistributionReport(blocks, sublayers, weights)

    def _score(self, graph: Graph, weights: Sequence[Node]) -> float:
        if self.pooled or not weights:
            return self._share(graph, weights)
        return statistics.mean(self._share(graph, [weight]) for weight in weights)

    def _share(self, graph: Graph, weights: Sequence[Node]) -> float:
        """The share of entries that are far from the mean of all `weights`."""
        count, total, squares = 0, 0.0, 0.0
        for piece in _pieces(graph, weights):
            count += piece.numel()
            total += float(piece.sum())
            squares += float(piece.square().sum())
        if count == 0:
            return 0.0
        mean = total / count
        least = self.threshold * max(squares / count - mean * mean, 0.0) ** 0.5
        far = 0
        for piece in _pieces(graph, weights):
            distance = piece - mean
            far += int(((distance.abs() if self.both_sides else distance) > least).sum())
        return far / count


def _matrices_of_block(block: Block) -> list[Node]:
    return list(dict.fromkeys(node for part in block.sublayers for node in _matrices(part)))


def _matrices(branch: Sublayer) -> list[Node]:
    """The weights of a branch with two axes or more, each once, in the order of their readers."""
    read = [operand for node in branch.nodes for operand in node.all_input_nodes]
    weights = dict.fromkeys(node for node in read if node.op == "get_attr")
    floats = [node for node in weights if node.meta["val"].is_floating_point()]
    return sorted((n for n in floats if n.meta["val"].ndim >= 2), key=lambda node: node.name)


def _pieces(graph: Graph, weights: Iterable[Node]) -> Iterator[Tensor]:
    """All entries as float64, a few million at a time."""
    for node in weights:
        for piece in graph.weight(node).flatten().split(1 << 22):
            yield piece.double()
