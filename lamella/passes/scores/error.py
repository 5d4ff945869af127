"""How far a weight moves when it is rounded: scores of weights without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.quantize import Format, dequantized
from lamella.ir.reducers import Gram, RoundingVariance
from lamella.ir.runner import Request, sweep_requests
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, finite
from lamella.passes.sites import Site, find_sites


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
        losses: dict[str, dict[Format, float]] = {}
        for site in find_sites(graph):
            weight = graph.weight(site.node).float()
            size = weight.double().square().sum().clamp(min=1e-30)
            losses[site.weight] = {
                f: finite(float(error.double().square().sum() / size), site.weight)
                for f, error in errors_of(weight, self.formats)
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

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Run the samples once, a block at a time; Gram matrices are forgotten at once."""
        found: dict[str, dict[Format, float]] = {}
        for site, inputs in sites_with_inputs(graph, analyses.need_samples(), self._blocks()):
            weight = graph.weight(site.node).float()
            ones = torch.ones(weight.shape[0], dtype=torch.float64)
            size = self._error(weight, weight, ones, inputs, None).clamp(min=1e-30)
            found[site.weight] = {
                f: finite(float(self._error(error, weight, ones, inputs, f) / size), site.weight)
                for f, error in errors_of(weight, self.formats)
            }
        losses = {site.weight: found[site.weight] for site in find_sites(graph)}
        return BitScoreReport(self.name, losses, "relative")

    def _blocks(self) -> tuple[int, ...]:
        return rounded_blocks(self.formats) if self.int8_activations else ()

    def _error(
        self,
        error: Tensor,
        weight: Tensor,
        rows: Tensor,
        inputs: Mapping[str, Inputs],
        format: Format | None,
    ) -> Tensor:
        if not inputs:
            return quadratic(error, None, rows)
        terms = [squared_change(error, weight, rows, one, format) for one in inputs.values()]
        return torch.stack(terms).mean()


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of a linear layer.

    Attributes:
        gram: Mean outer product, float32 ``[in, in]``.
        variances: Block size -> what rounding to 8 bits in such blocks adds, ``[in]``.
    """

    gram: Tensor
    variances: Mapping[int, Tensor]


def rounded_blocks(formats: tuple[Format, ...]) -> tuple[int, ...]:
    """The block sizes in which kernels of these formats round activations."""
    return tuple(sorted({format.block for format in formats if format.bits != 32}))


def errors_of(weight: Tensor, formats: tuple[Format, ...]) -> Iterator[tuple[Format, Tensor]]:
    """Each format and the error it makes, ``W' - W``; zeros for a weight left as it is."""
    for format in formats:
        yield format, dequantized(weight, format) - weight


def quadratic(error: Tensor, gram: Tensor | None, rows: Tensor) -> Tensor:
    """``sum_n rows_n * error_n G error_n^T`` as float64.

    Args:
        error: ``[out, in]``.
        gram: ``[in, in]``, or None for the identity.
        rows: The weight of each row, ``[out]``.
    """
    projected = error if gram is None else error @ gram.to(error.dtype)
    per_row = (projected * error).sum(1, dtype=torch.float64)
    return (per_row * rows).sum()


def squared_change(
    error: Tensor, weight: Tensor, rows: Tensor, inputs: Inputs, format: Format | None
) -> Tensor:
    """The expected squared change of the outputs of a linear layer, each row times `rows`.

    ``sum_n rows_n (D_n G D_n^T + sum_k W_nk^2 v_k)``: the error D of the weight, and the
    variance v that the rounding of the inputs adds where `inputs` has it for the format.

    Args:
        error: ``[out, in]``.
        weight: ``[out, in]``.
        rows: ``[out]``, float64.
        inputs: Statistics of the inputs.
        format: None, or the format that decides how inputs are rounded.
    """
    change = quadratic(error, inputs.gram, rows)
    if format is None or format.bits == 32 or format.block not in inputs.variances:
        return change
    per_row = weight.double().square() @ inputs.variances[format.block].double()
    return change + (per_row * rows).sum()


def sites_with_inputs(
    graph: Graph, samples: Samples, blocks: tuple[int, ...]
) -> Iterator[tuple[Site, Mapping[str, Inputs]]]:
    """Every site with the statistics of the inputs of each linear layer that reads it, by name.

    The samples run once; a few Gram matrices are alive at a time. For a weight that only
    embeddings read the mapping is empty.
    """
    waiting = {site.weight: site for site in find_sites(graph)}
    requests = {name: _requests(site, blocks) for name, site in waiting.items()}
    known: dict[Request, Tensor] = {}
    for name in [name for name, needed in requests.items() if not needed]:
        yield waiting.pop(name), {}
    needed = [request for some in requests.values() for request in some]
    for finished in sweep_requests(graph, samples, needed):
        known.update(finished)
        for name in [n for n in waiting if all(one in known for one in requests[n])]:
            site = waiting.pop(name)
            yield site, {reader.name: _inputs(reader, blocks, known) for reader in linears(site)}
        still = {request for name in waiting for request in requests[name]}
        known = {request: value for request, value in known.items() if request in still}


def linears(site: Site) -> tuple[Node, ...]:
    """The linear layers that read a weight."""
    return tuple(reader for reader in site.readers if reader.target is aten.linear.default)


def _requests(site: Site, blocks: tuple[int, ...]) -> tuple[Request, ...]:
    values = dict.fromkeys(str(linear.args[0]) for linear in linears(site))
    reducers = (Gram(), *(RoundingVariance(block) for block in blocks))
    return tuple(Request.of(reducer, value) for value in values for reducer in reducers)


def _inputs(linear: Node, blocks: tuple[int, ...], known: Mapping[Request, Tensor]) -> Inputs:
    value = str(linear.args[0])
    variances = {block: known[Request.of(RoundingVariance(block), value)] for block in blocks}
    return Inputs(known[Request.of(Gram(), value)], variances)
