"""Scores of weights that only order: those of the block, the size, or chance."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.ir.runner import Request
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, Level
from lamella.passes.scores.error import WeightError
from lamella.passes.scores.structure import (
    LimScore,
    SimilarityScore,
    ZdScore,
    parts_of,
    weights_of,
)
from lamella.passes.sites import find_sites

_FLOOR = 0.1


@dataclass(frozen=True)
class LimBits(BitScore):
    """The LIM importance of the block times the relative error of the weight.

    The importance is scaled to [0.1, 1] over the blocks; weights outside of blocks (embedding,
    head) have 1. The paper gives whole blocks a width; for single weights this is a prior.

    Attributes:
        formats: The formats to score.
    """

    name: ClassVar[str] = "lim"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """Those of the score of blocks."""
        return LimScore().requests(graph)

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Block score times weight error."""
        return _weighted(graph, analyses, LimScore(), self)


@dataclass(frozen=True)
class ZdBits(BitScore):
    """The ZD importance of the block times the relative error of the weight (see `LimBits`).

    Attributes:
        formats: The formats to score.
    """

    name: ClassVar[str] = "zd"

    formats: tuple[Format, ...] = ()

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Block score times weight error."""
        return _weighted(graph, analyses, ZdScore(), self)


@dataclass(frozen=True)
class SimilarityBits(BitScore):
    """The importance of the branch times the relative error of the weight (see `LimBits`).

    Attributes:
        formats: The formats to score.
    """

    name: ClassVar[str] = "similarity"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """Those of the score of branches."""
        return SimilarityScore("sublayer").requests(graph)

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Branch score times weight error."""
        return _weighted(graph, analyses, SimilarityScore("sublayer"), self)


@dataclass(frozen=True)
class SizeBits(BitScore):
    """All weights lose the same, ``4^-bits``: the largest are narrowed first.

    Attributes:
        formats: The formats to score.
    """

    name: ClassVar[str] = "size"

    formats: tuple[Format, ...] = ()

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """A constant per format."""
        losses = {f: _by_width(f) for f in self.formats}
        return BitScoreReport(
            self.name, {site.weight: losses for site in find_sites(graph)}, "relative"
        )


@dataclass(frozen=True)
class RandomBits(BitScore):
    """Entries times ``4^-bits`` times a seeded number: a random order per byte, to compare with.

    Attributes:
        formats: The formats to score.
        seed: Of the order.
    """

    name: ClassVar[str] = "random"

    formats: tuple[Format, ...] = ()
    seed: int = 0

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Draw one number per weight, in the order of the graph."""
        draw = random.Random(self.seed)
        sites = find_sites(graph)
        total = sum(site.size for site in sites)
        losses: dict[str, dict[Format, float]] = {}
        for site in sites:
            factor = draw.random() * site.size / total
            losses[site.weight] = {f: factor * _by_width(f) for f in self.formats}
        return BitScoreReport(self.name, losses, "relative")


def _by_width(format: Format) -> float:
    return 0.0 if format.bits == 32 else 4.0**-format.bits


def _weighted(
    graph: Graph,
    analyses: Analyses,
    score: LimScore | ZdScore | SimilarityScore,
    by: LimBits | ZdBits | SimilarityBits,
) -> BitScoreReport:
    """Weight error times the importance of the block or branch that reads the weight."""
    errors = analyses.get(WeightError(by.formats))
    factors = _factors(graph, analyses.get(score).importance(), score.level)
    losses = {
        name: {f: factors.get(name, 1.0) * loss for f, loss in by_format.items()}
        for name, by_format in errors.losses.items()
    }
    return BitScoreReport(by.name, losses, "relative")


def _factors(graph: Graph, importance: Mapping[str, float], level: Level) -> dict[str, float]:
    """Name of the weight -> importance of the part that reads it, scaled to [0.1, 1]."""
    low = min(importance.values(), default=0.0)
    spread = max(importance.values(), default=0.0) - low or 1.0
    factors: dict[str, float] = {}
    for part in parts_of(graph, level):
        # A part that can't be dropped has no score: nothing is more important.
        scored = importance.get(part.name, low + spread)
        scaled = _FLOOR + (1 - _FLOOR) * (scored - low) / spread
        for weight in weights_of(part):
            name = str(weight.target)
            factors[name] = max(factors.get(name, 0.0), scaled)
    return factors
