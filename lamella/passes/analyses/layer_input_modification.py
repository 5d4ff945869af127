"""How much every block changes the direction of the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from lamella.ir.graph import Graph
from lamella.ir.runner import Request
from lamella.passes.analyses.stream_cosine import block_requests, sublayer_requests
from lamella.passes.base import Analyses, Analysis


@dataclass(frozen=True)
class LayerInputModificationReport:
    """Scores of `LayerInputModification`.

    Attributes:
        values: Name of the block (or branch) -> minus the cosine, in [-1, 1]; larger means more
            important.
        level: ``"block"`` or ``"sublayer"``.
    """

    values: Mapping[str, float]
    level: str


@dataclass(frozen=True)
class LayerInputModification(Analysis[LayerInputModificationReport]):
    """The LIM score: ``-cos(entry, exit)`` of every block, mean over tokens and samples.

    A block that hardly turns the stream scores close to -1 and is unimportant. The cosine is
    taken per token in float32 and then averaged; padding is left out.

    Attributes:
        level: ``"block"`` as in the paper, or ``"sublayer"`` for each branch (a deviation).

    References:
        [Dumitru2024], equation 1.
    """

    name: ClassVar[str] = "layer-input-modification"

    level: Literal["block", "sublayer"] = "block"

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """One mean cosine per block or branch."""
        return tuple(self._requests(graph).values())

    def run(self, graph: Graph, analyses: Analyses) -> LayerInputModificationReport:
        """Run the samples once."""
        requests = self._requests(graph)
        statistics = analyses.statistics(requests.values())
        values = {name: -float(statistics[request]) for name, request in requests.items()}
        return LayerInputModificationReport(values, self.level)

    def _requests(self, graph: Graph) -> dict[str, Request]:
        return block_requests(graph) if self.level == "block" else sublayer_requests(graph)
