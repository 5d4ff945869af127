"""The loss of a quantized model on sequences that nobody looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import lamella
from benchmarks.scores.cases import Case, outputs
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.passes.scores.target import loss_target
from lamella.passes.sites import find_sites

DRAWS = 400


@dataclass(frozen=True)
class Judge:
    """Compares outputs with those of the unchanged model, sequence by sequence."""

    case: Case

    @cached_property
    def reference(self) -> list[Tensor]:
        """Rows of the output for each sequence."""
        return outputs(self.case.graph, self.case.unseen)

    @cached_property
    def tokens(self) -> Tensor:
        """Rows of each sequence."""
        return torch.tensor([len(rows) for rows in self.reference], dtype=torch.float64)

    def losses(self, plan: Mapping[str, Format]) -> Tensor:
        """The loss of each sequence with the numerics that are deployed."""
        return self.of_outputs(outputs(quantized(self.case.graph, plan), self.case.unseen))

    def of_weights(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The loss of each sequence with other weights, activations in float32."""
        edited = self.case.graph.copy()
        for site in find_sites(edited):
            edited.set_weight(site.node, weights[site.weight])
        return self.of_outputs(outputs(edited, self.case.unseen))

    def of_outputs(self, rows: Sequence[Tensor]) -> Tensor:
        """The loss of each sequence, float64."""
        target = loss_target(self.case.graph)
        pairs = zip(self.reference, rows, strict=True)
        return torch.tensor([target.loss(one, two) for one, two in pairs], dtype=torch.float64)

    def mean(self, losses: Tensor) -> float:
        """Per token."""
        return float(losses.sum() / self.tokens.sum())

    def difference(self, one: Tensor, two: Tensor) -> tuple[float, float]:
        """A 95 % bootstrap interval, over sequences, of the ratio of two mean losses."""
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(one), (DRAWS, len(one)), generator=generator)
        ratios = one[picks].sum(1) / two[picks].sum(1)
        low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64))
        return float(low), float(high)


def quantized(graph: Graph, plan: Mapping[str, Format]) -> Graph:
    """The model stored as a plan says, rounded to nearest with searched scales."""
    edited = graph.copy()
    edited.plan = dict(plan)
    lamella.transform(edited, ["quantize-weights min_size=0"])
    return edited
