"""How far a weight moves when it is rounded: scores of weights without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.ir.reducers import RoundingVariance
from lamella.ir.runner import Request
from lamella.passes.analyses.row_errors import WHOLE, RowErrors, errors_of
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, finite
from lamella.passes.sites import find_sites


@dataclass(frozen=True)
class WeightError(BitScore):
    """The relative squared error of a weight, ``|W' - W|^2 / |W|^2``. No data is needed.

    Attributes:
        formats: The formats to score.
    """

    name: ClassVar[str] = "weight-error"

    formats: tuple[Format, ...] = ()

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Round every weight to every format."""
        losses = {
            site.weight: _relative_errors(graph.weight(site.node), self.formats, site.weight)
            for site in find_sites(graph)
        }
        return BitScoreReport(self.name, losses, "relative")


@dataclass(frozen=True)
class OutputError(BitScore):
    """The relative squared error of what a layer computes, ``tr(D G D^T) / tr(W G W^T)``.

    ``D = W' - W`` and G is the mean outer product of the inputs. With `int8_activations` the
    rounding of the inputs by the fast kernels is added. Weights that only embeddings read have
    G = 1. It ranks layers within a role well, and hardly across roles.

    Attributes:
        formats: The formats to score.
        int8_activations: Whether the kernel rounds its input to 8 bits.
    """

    name: ClassVar[str] = "output-error"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    int8_activations: bool = True

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """What rounding to 8 bits adds to the inputs of all linear layers."""
        return rounding_requests(graph, self.formats) if self.int8_activations else ()

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Add up the errors of the outputs of each layer; several layers count alike."""
        rows = analyses.get(RowErrors(self.formats)).layers
        noise = analyses.statistics(self.requests(graph)) if self.int8_activations else {}
        losses: dict[str, dict[Format, float]] = {}
        for site in find_sites(graph):
            weight = graph.weight(site.node)
            if not site.linears:
                losses[site.weight] = _relative_errors(weight, self.formats, site.weight)
                continue
            columns = weight.double().square().sum(0)
            losses[site.weight] = dict.fromkeys(self.formats, 0.0)
            for f in (f for f in self.formats if f.bits != 32):
                changes = sum(
                    float(rows[layer.name][f].sum()) + _of_rounding(layer, f, columns, noise)
                    for layer in site.linears
                )
                size = sum(float(rows[layer.name][WHOLE].sum()) for layer in site.linears)
                losses[site.weight][f] = finite(changes / max(size, 1e-30), site.weight)
        return BitScoreReport(self.name, losses, "relative")


def rounding_request(layer: Node, format: Format) -> Request:
    """What rounding the input of a linear layer to 8 bits adds to each channel."""
    return Request.of(RoundingVariance(format.block), str(layer.args[0]))


def rounding_requests(graph: Graph, formats: tuple[Format, ...]) -> tuple[Request, ...]:
    """The same for all linear layers and formats."""
    found = (
        rounding_request(layer, format)
        for site in find_sites(graph)
        for layer in site.linears
        for format in formats
        if format.bits != 32
    )
    return tuple(dict.fromkeys(found))


def _of_rounding(
    layer: Node, format: Format, columns: Tensor, noise: Mapping[Request, Tensor]
) -> float:
    """``sum_k v_k sum_n W_nk^2`` for the variance v of the rounding of inputs."""
    variance = noise.get(rounding_request(layer, format))
    return 0.0 if variance is None else float(columns @ variance)


def _relative_errors(weight: Tensor, formats: tuple[Format, ...], name: str) -> dict[Format, float]:
    size = max(float(weight.double().square().sum()), 1e-30)
    errors = {f: float(e.double().square().sum()) for f, e in errors_of(weight.float(), formats)}
    return {f: finite(errors.get(f, 0.0) / size, name) for f in formats}
