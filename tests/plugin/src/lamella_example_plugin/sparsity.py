"""How many weights are zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from lamella.ir.graph import Graph
from lamella.passes.base import Analyses, Analysis

aten = torch.ops.aten


@dataclass(frozen=True)
class SparsityReport:
    """Shares of zeros.

    Attributes:
        ratios: Name of a weight of a linear layer -> share of its entries that are zero.
    """

    ratios: Mapping[str, float]


@dataclass(frozen=True)
class Sparsity(Analysis[SparsityReport]):
    """The share of zeros in the weight of every linear layer."""

    name: ClassVar[str] = "sparsity"

    def run(self, graph: Graph, analyses: Analyses) -> SparsityReport:
        """Count, one weight at a time."""
        ratios: dict[str, float] = {}
        for layer in graph.find(aten.linear.default):
            reader = graph.operand(layer, "weight")
            zeros = int((graph.weight(reader) == 0).sum())
            ratios[str(reader.target)] = zeros / graph.weight(reader).numel()
        return SparsityReport(ratios)
