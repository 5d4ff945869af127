"""Small weights become zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lamella.ir.graph import Graph
from lamella.passes.base import Analyses, Effect, Transform

aten = torch.ops.aten


@dataclass(frozen=True)
class PruneByMagnitude(Transform):
    """Set the smallest entries of the weight of every linear layer to zero.

    Shapes stay as they are: the result is smaller only for a backend that stores sparse
    weights. A weight that several layers share is pruned once.

    Attributes:
        sparsity_ratio: Share of the entries of each weight that become zero, in [0, 1).
            Entries as large as the threshold are pruned too.

    Raises:
        ValueError: `sparsity_ratio` is outside [0, 1).
    """

    name: ClassVar[str] = "prune-by-magnitude"
    effect: ClassVar[Effect] = Effect.LOSSY

    sparsity_ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity_ratio < 1.0:
            raise ValueError(f"sparsity_ratio must be in [0, 1), got {self.sparsity_ratio}")

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Prune the distinct weights one by one."""
        layers = graph.find(aten.linear.default)
        for reader in dict.fromkeys(graph.operand(layer, "weight") for layer in layers):
            weight = graph.weight(reader)
            count = int(self.sparsity_ratio * weight.numel())
            # `kthvalue` needs k >= 1; with nothing to prune there is no threshold.
            if count:
                threshold = weight.abs().flatten().kthvalue(count).values
                graph.set_weight(reader, weight.where(weight.abs() > threshold, 0.0))
