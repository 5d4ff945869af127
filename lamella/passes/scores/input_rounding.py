"""What kernels with 8-bit activations lose by rounding their inputs, whatever the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.ir.runner import Request
from lamella.passes.base import Analyses
from lamella.passes.scores.error import rounding_request, rounding_requests
from lamella.passes.scores.output_gradients import OutputGradients
from lamella.passes.sites import Site


@dataclass(frozen=True)
class InputRounding:
    """``1/2 sum_k E[h_k^2] v_k`` for each linear layer.

    h is the gradient at the input of a layer, by way of that layer alone, and v the variance that
    rounding adds to a channel (`lamella.ir.reducers.RoundingVariance`).

    Attributes:
        gradients: Name of the layer -> ``E[h^2]``, float64 ``[in]``.
        variances: By request.
    """

    gradients: Mapping[str, Tensor]
    variances: Mapping[Request, Tensor]

    @classmethod
    def of(
        cls,
        graph: Graph,
        analyses: Analyses,
        formats: tuple[Format, ...],
        gradients: OutputGradients | None = None,
    ) -> InputRounding:
        """Ask for what it takes."""
        found = analyses.get(gradients or OutputGradients())
        return cls(found.inputs, analyses.statistics(rounding_requests(graph, formats)))

    def loss(self, site: Site, format: Format) -> float:
        """The loss per token of the layers that read a weight in a format."""
        if format.bits == 32:
            return 0.0
        return 0.5 * sum(
            float(self.gradients[layer.name] @ self.variances[rounding_request(layer, format)])
            for layer in site.linears
            if layer.name in self.gradients
        )
