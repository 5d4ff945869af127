"""Scores of blocks and branches: what `drop-blocks` and `drop-sublayers` sort by."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.runner import Request
from lamella.ir.stream import Block, Sublayer
from lamella.passes.analyses.branch_similarity import BranchSimilarity
from lamella.passes.analyses.layer_input_modification import LayerInputModification
from lamella.passes.analyses.z_score_distribution import ZScoreDistribution
from lamella.passes.base import Analyses
from lamella.passes.scores.base import Level, Meaning, Score, ScoreReport


@dataclass(frozen=True)
class LimScore(Score):
    """How much a block turns its input (see `LayerInputModification`)."""

    name: ClassVar[str] = "lim"
    meaning: ClassVar[Meaning] = "important"

    level: Level = "block"

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """Those of the analysis."""
        return LayerInputModification(self.level).requests(graph)

    def run(self, graph: Graph, analyses: Analyses) -> ScoreReport:
        """Minus the cosine of entry and exit, for each block or branch."""
        report = analyses.get(LayerInputModification(self.level))
        return ScoreReport(self.name, self.level, report.values, "-cosine", self.meaning)


@dataclass(frozen=True)
class SimilarityScore(Score):
    """One minus the cosine of the stream before and after (see `BranchSimilarity`)."""

    name: ClassVar[str] = "similarity"
    meaning: ClassVar[Meaning] = "important"

    level: Level = "block"

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """Those of the analysis."""
        return BranchSimilarity().requests(graph)

    def run(self, graph: Graph, analyses: Analyses) -> ScoreReport:
        """``1 - cosine`` for each block or branch."""
        report = analyses.get(BranchSimilarity())
        values = report.blocks if self.level == "block" else report.sublayers
        return ScoreReport(self.name, self.level, values, "1-cosine", self.meaning)


@dataclass(frozen=True)
class ZdScore(Score):
    """The share of weights that stand out (see `ZScoreDistribution`)."""

    name: ClassVar[str] = "zd"
    meaning: ClassVar[Meaning] = "dispensable"

    level: Level = "block"

    def run(self, graph: Graph, analyses: Analyses) -> ScoreReport:
        """The share of ``z > 1``; smaller is more important."""
        report = analyses.get(ZScoreDistribution())
        values = report.blocks if self.level == "block" else report.sublayers
        return ScoreReport(self.name, self.level, values, "share", self.meaning)


@dataclass(frozen=True)
class SizeScore(Score):
    """The bytes of the weights that go: the largest is dropped first."""

    name: ClassVar[str] = "size"
    meaning: ClassVar[Meaning] = "dispensable"

    level: Level = "block"

    def run(self, graph: Graph, analyses: Analyses) -> ScoreReport:
        """Bytes of the weights that each block or branch reads."""
        values = {
            part.name: float(sum(_nbytes(weight) for weight in weights_of(part)))
            for part in parts_of(graph, self.level)
        }
        return ScoreReport(self.name, self.level, values, "bytes", self.meaning)


@dataclass(frozen=True)
class RandomScore(Score):
    """A seeded order, to compare others with.

    Attributes:
        level: What is scored.
        seed: Of the order.
    """

    name: ClassVar[str] = "random"
    meaning: ClassVar[Meaning] = "important"

    level: Level = "block"
    seed: int = 0

    def run(self, graph: Graph, analyses: Analyses) -> ScoreReport:
        """Uniform numbers in [0, 1)."""
        draw = random.Random(self.seed)
        values = {part.name: draw.random() for part in parts_of(graph, self.level)}
        return ScoreReport(self.name, self.level, values, "none", self.meaning)


def parts_of(graph: Graph, level: Level) -> Sequence[Block | Sublayer]:
    """The blocks or the branches of a graph."""
    return graph.blocks if level == "block" else graph.stream.sublayers


def weights_of(part: Block | Sublayer) -> tuple[Node, ...]:
    """The weights that a block or branch reads, each once."""
    branches = part.sublayers if isinstance(part, Block) else (part,)
    nodes = [node for branch in branches for node in branch.nodes]
    read = [operand for node in nodes for operand in node.all_input_nodes]
    return tuple(dict.fromkeys(node for node in read if node.op == "get_attr"))


def _nbytes(weight: Node) -> int:
    value = weight.meta["val"]
    return int(value.numel()) * value.element_size()
