"""The scores of HAWQ: the curvature of the loss along a weight times the error of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.ir.runner import Request
from lamella.passes.analyses.row_errors import errors_of
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, finite
from lamella.passes.scores.error import rounding_requests
from lamella.passes.scores.hessian import Hessian, largest_eigenvalues, traces
from lamella.passes.scores.input_rounding import InputRounding
from lamella.passes.scores.target import first_sequences, loss_target
from lamella.passes.sites import find_sites


@dataclass(frozen=True)
class Hawq(BitScore):
    """``1/2 tr(H) / n |W' - W|^2``: the mean curvature of a weight times its squared error.

    H is the block of the Hessian that belongs to a weight of n entries, for the loss of the
    model against its own output; its trace comes from Hutchinson's method with one vector of
    signs over all weights. The paper leaves out the factor 1/2, with which it is the loss of
    errors in random directions. With `int8_activations` the rounding of inputs is added as in
    `fisher-gram`. Errors of rounding are not random where inputs have large channels: that is
    what `fisher` sees and a trace does not.

    Each probe costs two backward runs; all sequences are in memory at once.

    Attributes:
        formats: The formats to score.
        int8_activations: Whether the kernel rounds its input to 8 bits.
        sequences: How many sequences of the samples run.
        probes: Vectors for the traces.
        seed: Of the vectors.

    Raises:
        ValueError: `sequences` or `probes` is smaller than 1.

    References:
        [Dong2020], sections 3.1 and 3.2.
    """

    name: ClassVar[str] = "hawq"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    int8_activations: bool = True
    sequences: int = 8
    probes: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.probes < 1:
            raise ValueError(
                f"sequences and probes must be at least 1, got {self.sequences} and {self.probes}"
            )

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """What rounding to 8 bits adds to the inputs of all linear layers."""
        return rounding_requests(graph, self.formats) if self.int8_activations else ()

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Estimate the traces, and multiply them by the errors of the weights."""
        found = traces(_hessian(graph, analyses, self.sequences), self.probes, self.seed)
        rounding = (
            InputRounding.of(graph, analyses, self.formats) if self.int8_activations else None
        )
        losses: dict[str, dict[Format, float]] = {}
        for site in find_sites(graph):
            mean = 0.5 * found.get(site.weight, 0.0) / site.size
            losses[site.weight] = {
                f: finite(mean * error + (rounding.loss(site, f) if rounding else 0.0), site.weight)
                for f, error in _squared_errors(graph.weight(site.node), self.formats).items()
            }
        return BitScoreReport(self.name, losses, loss_target(graph).unit)


@dataclass(frozen=True)
class HawqEigenvalue(BitScore):
    """``lambda / n |W' - W|^2`` with the largest eigenvalue of the Hessian of a weight.

    The first form of HAWQ ranks layers by the eigenvalue over the entries of the layer alone; the
    squared error makes it a score of formats, as in `hawq`. One direction says little about an
    error that is spread over all of them: it orders, and does not predict. A power iteration
    for each weight makes it the most expensive of all scores but `kl`.

    Attributes:
        formats: The formats to score.
        sequences: How many sequences of the samples run.
        rounds: The most products for a weight.
        tolerance: A power iteration stops when the estimate changes by a smaller share.
        seed: Of the first vectors.

    Raises:
        ValueError: `sequences` or `rounds` is smaller than 1.

    References:
        [Dong2019], section 3.3.
    """

    name: ClassVar[str] = "hawq-eigenvalue"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    sequences: int = 4
    rounds: int = 20
    tolerance: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.rounds < 1:
            raise ValueError(
                f"sequences and rounds must be at least 1, got {self.sequences} and {self.rounds}"
            )

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Find the eigenvalues, and multiply them by the errors of the weights."""
        hessian = _hessian(graph, analyses, self.sequences)
        found = largest_eigenvalues(hessian, self.rounds, self.tolerance, self.seed)
        losses: dict[str, dict[Format, float]] = {}
        for site in find_sites(graph):
            mean = found.get(site.weight, 0.0) / site.size
            errors = _squared_errors(graph.weight(site.node), self.formats)
            losses[site.weight] = {f: finite(mean * e, site.weight) for f, e in errors.items()}
        return BitScoreReport(self.name, losses, "relative")


def _hessian(graph: Graph, analyses: Analyses, sequences: int) -> Hessian:
    samples = first_sequences(analyses.need_samples(), sequences)
    return Hessian(graph, loss_target(graph), find_sites(graph), samples)


def _squared_errors(weight: Tensor, formats: tuple[Format, ...]) -> Mapping[Format, float]:
    errors = {f: float(e.double().square().sum()) for f, e in errors_of(weight.float(), formats)}
    return {f: errors.get(f, 0.0) for f in formats}
