"""Which inputs of linear layers hold spikes: a few tokens far larger than all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lamella.ir.graph import Graph
from lamella.ir.reducers import RowMaxima
from lamella.ir.runner import Request
from lamella.passes.base import Analyses, Analysis
from lamella.passes.sites import find_sites


@dataclass(frozen=True)
class SpikesReport:
    """What `Spikes` found.

    Attributes:
        ratios: Name of the weight -> the largest token over the median token of what the layers
            read that multiply by it; of several layers the largest ratio.
        threshold: From which ratio on an input has spikes.
    """

    ratios: Mapping[str, float]
    threshold: float

    @property
    def spiky(self) -> tuple[str, ...]:
        """The weights whose inputs have spikes, the largest ratio first."""
        found = [name for name, ratio in self.ratios.items() if ratio >= self.threshold]
        return tuple(sorted(found, key=lambda name: -self.ratios[name]))

    def reasons(self) -> dict[str, str]:
        """Name of each weight whose input should not be rounded to 8 bits -> why."""
        return {
            name: f"its input has spikes, {self.ratios[name]:.0f} times the median token"
            for name in self.spiky
        }


@dataclass(frozen=True)
class Spikes(Analysis[SpikesReport]):
    """The ratio ``max_t |x_t|_inf / median_t |x_t|_inf`` of the input of every linear layer.

    A spike on one token leaves the others few of the 255 steps of a common scale, and takes
    those of its own row from all other channels. Where the ratio is large the activation should
    keep its precision; the weight may still have few bits. In large Llamas it is in the
    thousands in one or two projections and below 20 in all others. Spikes sit on the first
    tokens: samples have to start as inputs will.

    The papers take the ratio within each sample and then the mean; here tokens of all samples
    are one set, so that the ratio does not depend on batches and the largest spike counts.

    Attributes:
        threshold: From which ratio on an input has spikes.

    Raises:
        ValueError: `threshold` is not above 1.

    References:
        [Maisonnave2025], section 3; [Yang2024], the coefficient of QFeM.
    """

    name: ClassVar[str] = "spikes"

    threshold: float = 20.0

    def __post_init__(self) -> None:
        if not self.threshold > 1.0:
            raise ValueError(f"threshold must be above 1, got {self.threshold}")

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """The largest magnitude of each token of all inputs."""
        return tuple(dict.fromkeys(one for some in _requests(graph).values() for one in some))

    def run(self, graph: Graph, analyses: Analyses) -> SpikesReport:
        """Run the samples once."""
        known = analyses.statistics(self.requests(graph))
        ratios: dict[str, float] = {}
        for name, requests in _requests(graph).items():
            maxima = [known[request].double() for request in requests]
            ratios[name] = max(float(m.max() / m.median().clamp(min=1e-30)) for m in maxima)
        return SpikesReport(ratios, self.threshold)


def _requests(graph: Graph) -> dict[str, list[Request]]:
    """For each weight of a linear layer, the inputs of its readers."""
    found = {
        site.weight: [Request.of(RowMaxima(), str(reader.args[0])) for reader in site.linears]
        for site in find_sites(graph)
    }
    return {name: requests for name, requests in found.items() if requests}
