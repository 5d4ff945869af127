"""What rounding a weight costs when tokens and outputs are independent: two taps for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.ir.runner import Request
from lamella.passes.analyses.row_errors import RowErrors, errors_of
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, finite
from lamella.passes.scores.error import rounding_requests
from lamella.passes.scores.input_rounding import InputRounding
from lamella.passes.scores.output_gradients import (
    PROBES,
    Draws,
    OutputGradients,
    OutputGradientsReport,
)
from lamella.passes.scores.target import loss_target
from lamella.passes.sites import Site, find_sites


@dataclass(frozen=True)
class FisherGram(BitScore):
    """``1/2 sum_n E[g_n^2] D_n G D_n^T`` for the error D of a weight, in the loss per token.

    G is the mean outer product of the inputs of a layer, g the gradient at its outputs. With
    `int8_activations` the rounding of inputs adds ``1/2 sum_k E[h_k^2] v_k``, with h the gradient
    at the input by way of this layer and v the variance of the rounding. An embedding has
    ``1/2 sum_k E[g_k^2] sum_v p_v D_vk^2`` for the frequency p of its rows.

    It is the diagonal of the outputs of the Kronecker-factored Fisher matrix: what one token
    does is taken to be independent of what others do, and one output of another. `fisher`
    assumes neither and ranks better where there is one loss for many tokens (images); this one
    is less noisy with few sequences, holds no error of a weight longer than it takes to use it,
    and any number of formats costs no further run. One run forwards and backwards for the
    gradients, one forwards for the inputs.

    Attributes:
        formats: The formats to score.
        int8_activations: Whether the kernel rounds its input to 8 bits.
        sequences: How many sequences of the samples run backwards.
        draws: Losses per sequence; None means as many as make 112 with all sequences, at most 8.
        seed: Of the draws.

    Raises:
        ValueError: `sequences` or `draws` is smaller than 1.

    References:
        [Martens2015], section 3, for the factors.
    """

    name: ClassVar[str] = "fisher-gram"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    int8_activations: bool = True
    sequences: int = PROBES
    draws: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        Draws(self.sequences, self.draws, self.seed)

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """What rounding to 8 bits adds to the inputs of all linear layers."""
        return rounding_requests(graph, self.formats) if self.int8_activations else ()

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Multiply the errors of outputs by what the loss hangs on them."""
        asked = OutputGradients(self.sequences, self.draws, self.seed)
        gradients = analyses.get(asked)
        rows = analyses.get(RowErrors(self.formats)).layers
        rounding = None
        if self.int8_activations:
            rounding = InputRounding.of(graph, analyses, self.formats, asked)
        losses: dict[str, dict[Format, float]] = {}
        for site in find_sites(graph):
            found = _of_tables(graph, site, self.formats, gradients)
            for f in (f for f in self.formats if f.bits != 32):
                found[f] += sum(
                    0.5 * _dot(gradients.outputs, layer, rows[layer.name][f])
                    for layer in site.linears
                )
                found[f] += rounding.loss(site, f) if rounding else 0.0
            losses[site.weight] = {f: finite(loss, site.weight) for f, loss in found.items()}
        return BitScoreReport(self.name, losses, loss_target(graph).unit)


def _dot(squares: Mapping[str, Tensor], layer: Node, value: Tensor) -> float:
    """The sum of `value` weighted by squared gradients; 0 where no gradient reaches the layer."""
    found = squares.get(layer.name)
    return 0.0 if found is None else float(found @ value.double())


def _of_tables(
    graph: Graph, site: Site, formats: tuple[Format, ...], gradients: OutputGradientsReport
) -> dict[Format, float]:
    """What the embeddings that read a weight lose in each format."""
    found = dict.fromkeys(formats, 0.0)
    tables = [reader for reader in site.readers if reader.name in gradients.counts]
    if not tables:
        return found
    for f, error in errors_of(graph.weight(site.node).float(), formats):
        squares = error.square()
        for table in tables:
            counts = gradients.counts[table.name]
            shares = (counts / counts.sum().clamp(min=1e-30)).to(squares.dtype)
            found[f] += 0.5 * _dot(gradients.outputs, table, shares @ squares)
    return found
