"""How similar the residual stream is before and after every block and every branch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lamella.ir.graph import Graph
from lamella.ir.runner import Request
from lamella.passes.analyses.stream_cosine import block_requests, sublayer_requests
from lamella.passes.base import Analyses, Analysis


@dataclass(frozen=True)
class BranchSimilarityReport:
    """Scores of `BranchSimilarity`; each is in [0, 2], larger means more important.

    Attributes:
        blocks: Name of the block -> score.
        sublayers: Name of the branch -> score.
        kinds: Name of the branch -> attention, mlp, …
    """

    blocks: Mapping[str, float]
    sublayers: Mapping[str, float]
    kinds: Mapping[str, str]

    def of_kind(self, kind: str) -> dict[str, float]:
        """The scores of the branches of one kind."""
        return {name: v for name, v in self.sublayers.items() if self.kinds[name] == kind}


@dataclass(frozen=True)
class BranchSimilarity(Analysis[BranchSimilarityReport]):
    """``1 - cos(x, x + f(x))`` of every block, attention and MLP, mean over tokens and samples.

    The residual is included on both sides, the cosine is taken per token in float32, and
    padding is left out. Attention and MLP scores live on different scales: compare within one
    kind.

    References:
        [Men2024], block influence; [He2024], section 3.
    """

    name: ClassVar[str] = "branch-similarity"

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """One mean cosine per block and per branch."""
        return (*block_requests(graph).values(), *sublayer_requests(graph).values())

    def run(self, graph: Graph, analyses: Analyses) -> BranchSimilarityReport:
        """Run the samples once."""
        statistics = analyses.statistics(self.requests(graph))

        def scores(requests: Mapping[str, Request]) -> dict[str, float]:
            return {name: 1.0 - float(statistics[one]) for name, one in requests.items()}

        kinds = {branch.name: branch.kind for branch in graph.stream.sublayers}
        return BranchSimilarityReport(
            scores(block_requests(graph)), scores(sublayer_requests(graph)), kinds
        )
