"""The size of weights, as pruning by magnitude sees it: controls that no pass takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, Level, Meaning, Score, ScoreReport
from lamella.passes.scores.structure import parts_of, weights_of
from lamella.passes.sites import find_sites


@dataclass(frozen=True)
class MagnitudeBits(BitScore):
    """``|W|^2 4^-bits``: large weights are kept wide.

    Attributes:
        formats: The formats to score.
    """

    name: ClassVar[str] = "magnitude"

    formats: tuple[Format, ...] = ()

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Look at every weight."""
        losses: dict[str, dict[Format, float]] = {}
        for site in find_sites(graph):
            square = float(graph.weight(site.node).double().square().sum())
            losses[site.weight] = {f: square * 4.0**-f.bits for f in self.formats}
        return BitScoreReport(self.name, losses, "relative")


@dataclass(frozen=True)
class MagnitudeScore(Score):
    """The norm of the weights that go: the smallest is dropped first."""

    name: ClassVar[str] = "magnitude"
    meaning: ClassVar[Meaning] = "important"

    level: Level = "block"

    def run(self, graph: Graph, analyses: Analyses) -> ScoreReport:
        """Look at the weights that each block or branch reads."""
        values = {
            part.name: sum(
                float(graph.weight(node).double().square().sum()) for node in weights_of(part)
            )
            ** 0.5
            for part in parts_of(graph, self.level)
        }
        return ScoreReport(self.name, self.level, values, "norm", self.meaning)
