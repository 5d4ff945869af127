"""What rounding a weight does to every output of a layer, from one run of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, dequantized
from lamella.ir.reducers import Gram
from lamella.ir.runner import Request, sweep_requests
from lamella.passes.base import Analyses, Analysis
from lamella.passes.sites import Site, find_sites

WHOLE = Format(32)
"""Stands for the outputs themselves beside their errors."""

RowsByFormat = Mapping[Format, Tensor]


@dataclass(frozen=True)
class RowErrorsReport:
    """What `RowErrors` found.

    Attributes:
        layers: Name of the linear layer -> format -> mean squared change of each output, float64
            ``[out]``; under `WHOLE` stands the mean square of the outputs.
    """

    layers: Mapping[str, RowsByFormat]


@dataclass(frozen=True)
class RowErrors(Analysis[RowErrorsReport]):
    """``D_n G D_n^T`` for each row n of the error D of a weight, and ``W_n G W_n^T``.

    G is the mean outer product of the inputs of a layer. A Gram matrix is made for each input
    and forgotten when the layers that read it are done: what is kept is one number for each
    output and format.

    Attributes:
        formats: The formats to round to.
    """

    name: ClassVar[str] = "row-errors"

    formats: tuple[Format, ...] = ()

    def run(self, graph: Graph, analyses: Analyses) -> RowErrorsReport:
        """Run the samples once, a block at a time."""
        layers: dict[str, RowsByFormat] = {}
        for site, grams in _sites_with_grams(graph, analyses.need_samples()):
            weight = graph.weight(site.node).float()
            values = {WHOLE: weight} | dict(errors_of(weight, self.formats))
            for layer, gram in grams.items():
                layers[layer] = {f: row_quadratics(value, gram) for f, value in values.items()}
        return RowErrorsReport(layers)


def errors_of(weight: Tensor, formats: tuple[Format, ...]) -> Iterator[tuple[Format, Tensor]]:
    """Each format that changes a weight and the error it makes, ``W' - W``."""
    for format in formats:
        if format.bits != 32:
            yield format, dequantized(weight, format) - weight


def row_quadratics(value: Tensor, gram: Tensor) -> Tensor:
    """``value_n G value_n^T`` for each row, float64 ``[out]``.

    Args:
        value: ``[out, in]``.
        gram: ``[in, in]``.
    """
    return ((value @ gram.to(value.dtype)) * value).sum(1, dtype=torch.float64)


def _sites_with_grams(
    graph: Graph, samples: Samples
) -> Iterator[tuple[Site, Mapping[str, Tensor]]]:
    """Every site that linear layers read, with the Gram matrix of the input of each, by name."""
    waiting = {site.weight: site for site in find_sites(graph) if site.linears}
    requests = {name: [_request(one) for one in site.linears] for name, site in waiting.items()}
    known: dict[Request, Tensor] = {}
    needed = [request for some in requests.values() for request in some]
    for finished in sweep_requests(graph, samples, needed):
        known.update(finished)
        for name in [n for n in waiting if all(one in known for one in requests[n])]:
            site = waiting.pop(name)
            yield site, {layer.name: known[_request(layer)] for layer in site.linears}
        still = {request for name in waiting for request in requests[name]}
        known = {request: value for request, value in known.items() if request in still}


def _request(layer: Node) -> Request:
    return Request.of(Gram(), str(layer.args[0]))
