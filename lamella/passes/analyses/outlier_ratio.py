"""How many weights of every block meet large inputs: the outlier ratio of OWL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.reducers import MeanSquare
from lamella.ir.runner import Request
from lamella.passes.base import Analyses, Analysis
from lamella.passes.sites import find_sites


@dataclass(frozen=True)
class OutlierRatioReport:
    """Scores of `OutlierRatio`, shares in [0, 1]; larger means more important.

    Attributes:
        blocks: Name of the block -> share.
    """

    blocks: Mapping[str, float]


@dataclass(frozen=True)
class OutlierRatio(Analysis[OutlierRatioReport]):
    """The share of ``A = |W_nk| |x_k|_2`` above `multiple` times the mean of A over the block.

    ``|x_k|_2`` is the norm of an input channel over all tokens, and A is that of all linear
    layers of a block together. The paper turns the share into the sparsity of the block.

    Attributes:
        multiple: How many times the mean an outlier is.

    Raises:
        ValueError: `multiple` is not positive.

    References:
        [Yin2024], equation 1.
    """

    name: ClassVar[str] = "outlier-ratio"

    multiple: float = 5.0

    def __post_init__(self) -> None:
        if not self.multiple > 0.0:
            raise ValueError(f"multiple must be positive, got {self.multiple}")

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """The mean square of all inputs of linear layers in blocks."""
        layers = [layer for some in _layers(graph).values() for layer in some]
        return tuple(dict.fromkeys(map(_request, layers)))

    def run(self, graph: Graph, analyses: Analyses) -> OutlierRatioReport:
        """Run the samples once; weights are read one by one, twice."""
        known = analyses.statistics(self.requests(graph))
        blocks = {
            name: self._share(graph, layers, known) for name, layers in _layers(graph).items()
        }
        return OutlierRatioReport(blocks)

    def _share(
        self, graph: Graph, layers: Iterable[Node], known: Mapping[Request, Tensor]
    ) -> float:
        layers = tuple(layers)
        total, count = 0.0, 0
        for layer in layers:
            product = _products(graph, layer, known)
            total, count = total + float(product.sum()), count + product.numel()
        if count == 0:
            return 0.0
        least = self.multiple * total / count
        above = sum(int((_products(graph, layer, known) > least).sum()) for layer in layers)
        return above / count


def _products(graph: Graph, layer: Node, known: Mapping[Request, Tensor]) -> Tensor:
    """``|W| |x|`` of one layer up to a factor common to all, float64 ``[out, in]``."""
    weight: Node = layer.args[1]  # pyright: ignore[reportAssignmentType]  # sites are bound
    return graph.weight(weight).double().abs() * torch.sqrt(known[_request(layer)])


def _request(layer: Node) -> Request:
    return Request.of(MeanSquare(), str(layer.args[0]))


def _layers(graph: Graph) -> dict[str, list[Node]]:
    """The linear layers of every block whose weights are sites."""
    linears = {layer for site in find_sites(graph) for layer in site.linears}
    return {
        block.name: [node for part in block.sublayers for node in part.nodes if node in linears]
        for block in graph.blocks
    }
