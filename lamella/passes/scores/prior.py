"""Scores of weights that only order: those of the block, the size, or chance."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.ir.runner import Request
from lamella.passes.analyses.activation_entropy import ActivationEntropy
from lamella.passes.analyses.outlier_ratio import OutlierRatio
from lamella.passes.analyses.z_score_distribution import ZScoreDistribution
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, Level
from lamella.passes.scores.error import WeightError
from lamella.passes.scores.structure import (
    LimScore,
    SimilarityScore,
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
        return _weighted(graph, analyses, analyses.get(LimScore()).importance(), self)


@dataclass(frozen=True)
class ZdBits(BitScore):
    """The ZD importance of the block times the relative error of the weight (see `LimBits`).

    The options are those of `ZScoreDistribution`; the defaults are those of the paper.

    Attributes:
        formats: The formats to score.
        both_sides: Count weights far below the mean too.
        threshold: How many deviations are far.
        pooled: One mean and deviation for all weights of the block.
    """

    name: ClassVar[str] = "zd"

    formats: tuple[Format, ...] = ()
    both_sides: bool = False
    threshold: float = 1.0
    pooled: bool = True

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Block score times weight error."""
        asked = ZScoreDistribution(self.both_sides, self.threshold, self.pooled)
        shares = analyses.get(asked).blocks
        return _weighted(graph, analyses, {name: -v for name, v in shares.items()}, self)


@dataclass(frozen=True)
class EntropyBits(BitScore):
    """The entropy of what a block computes times the relative error (see `LimBits`).

    LUQ gives the blocks of least entropy the fewest bits, whole blocks at a time.

    Attributes:
        formats: The formats to score.
        clusters: Of `ActivationEntropy`.

    References:
        [Bhatnagar2025], section 3.2.
    """

    name: ClassVar[str] = "luq"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    clusters: int = 100

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """Those of the analysis."""
        return ActivationEntropy(self.clusters).requests(graph)

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Block score times weight error."""
        entropies = analyses.get(ActivationEntropy(self.clusters)).blocks
        return _weighted(graph, analyses, entropies, self)


@dataclass(frozen=True)
class OwlBits(BitScore):
    """The outlier ratio of the block times the relative error (see `LimBits`).

    Attributes:
        formats: The formats to score.
        multiple: Of `OutlierRatio`.

    References:
        [Yin2024], equation 1; there it sets the sparsity of a block.
    """

    name: ClassVar[str] = "owl"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    multiple: float = 5.0

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """Those of the analysis."""
        return OutlierRatio(self.multiple).requests(graph)

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Block score times weight error."""
        return _weighted(graph, analyses, analyses.get(OutlierRatio(self.multiple)).blocks, self)


@dataclass(frozen=True)
class EndsBits(BitScore):
    """The first and last eighth of the blocks matter ten times as much as the rest.

    What tools do that keep some blocks at more bits by their place alone, times the relative
    error of the weight (see `LimBits`). No data is needed.

    Attributes:
        formats: The formats to score.
    """

    name: ClassVar[str] = "ends"

    formats: tuple[Format, ...] = ()

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Place of the block times weight error."""
        names = [block.name for block in graph.blocks]
        count = max(1, len(names) // 8)
        ends = {*names[:count], *names[len(names) - count :]}
        return _weighted(graph, analyses, {name: float(name in ends) for name in names}, self)


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
        importance = analyses.get(SimilarityScore("sublayer")).importance()
        return _weighted(graph, analyses, importance, self, "sublayer")


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
    importance: Mapping[str, float],
    by: LimBits | ZdBits | EntropyBits | OwlBits | EndsBits | SimilarityBits,
    level: Level = "block",
) -> BitScoreReport:
    """Weight error times the importance of the block or branch that reads the weight."""
    errors = analyses.get(WeightError(by.formats))
    factors = _factors(graph, importance, level)
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
