"""What rounding a weight costs, from forward and backward runs of the unchanged model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, dequantized
from lamella.ir.reducers import RoundingVariance
from lamella.ir.runner import Request
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, finite
from lamella.passes.scores.error import linears, rounded_blocks
from lamella.passes.scores.gradients import GradientRun
from lamella.passes.scores.target import (
    LossTarget,
    drawn_loss,
    first_sequences,
    loss_target,
    single_sequences,
)
from lamella.passes.sites import Site, find_sites

_ERROR_BYTES = 1 << 30
"""Errors of weights that are in memory at a time; more weights mean more runs."""


@dataclass(frozen=True)
class Fisher(BitScore):
    """The expected loss of rounding one weight, from second-order information.

    The error D of a weight changes the loss by ``1/2 E[<G, D>^2]``, where G is the gradient of
    the summed loss of one sequence with respect to the weight. For logits the labels are drawn
    from the model itself, and the result estimates the KL divergence per token; for other
    outputs the gradient is that of random projections of the normalized output, and the result
    estimates ``1 - cos``. With `int8_activations` the rounding of the inputs of linear layers
    adds ``1/2 sum_n E[g_n^2] sum_k W_nk^2 v_k`` (`RoundingVariance`), with g the gradient at the
    output of the layer.

    Errors of all tokens of a sequence are added before they are squared: those of keys and
    values point the same way at every token. The form that treats tokens as independent (the
    mean outer product of the inputs times that of the gradients) was measured to be off by a
    factor of 2 to 3 between layers on encoders, this one by 1.1 to 1.2.

    Attributes:
        formats: The formats to score.
        int8_activations: Whether the kernel rounds its input to 8 bits.
        sequences: How many sequences of the samples run, one at a time.
        draws: Labels or projections per sequence.
        seed: Of the draws.

    Raises:
        ValueError: `sequences` or `draws` is smaller than 1.

    References:
        [Martens2020], section 5.
    """

    name: ClassVar[str] = "fisher"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    int8_activations: bool = True
    sequences: int = 32
    draws: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.draws < 1:
            raise ValueError(
                f"sequences and draws must be at least 1, got {self.sequences} and {self.draws}"
            )

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """What rounding to 8 bits adds to the inputs of all linear layers."""
        if not self.int8_activations:
            return ()
        values = {str(one.args[0]) for site in find_sites(graph) for one in linears(site)}
        blocks = rounded_blocks(self.formats)
        return tuple(
            Request.of(RoundingVariance(block), value)
            for value in sorted(values)
            for block in blocks
        )

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Run the sequences once for every gigabyte of errors."""
        samples = first_sequences(analyses.need_samples(), self.sequences)
        requests = self.requests(graph)
        noise = analyses.statistics(requests) if requests else {}
        target = loss_target(graph)
        rounded = tuple(f for f in self.formats if f.bits != 32)
        losses: dict[str, dict[Format, float]] = {}
        for sites in groups_in_memory(find_sites(graph), len(rounded)):
            found = self._gradients(graph, target, samples, sites, rounded)
            for site in sites:
                weight = graph.weight(site.node)
                losses[site.weight] = {
                    f: finite(self._loss(found, site, weight, f, noise), site.weight)
                    for f in self.formats
                }
        return BitScoreReport(self.name, losses, target.unit)

    def _gradients(
        self,
        graph: Graph,
        target: LossTarget,
        samples: Samples,
        sites: Sequence[Site],
        formats: tuple[Format, ...],
    ) -> GradientRun:
        """The projections of the gradients on the errors of some weights."""
        errors: dict[str, Tensor] = {}
        for site in sites:
            weight = graph.weight(site.node).float()
            rounded = [dequantized(weight, f) - weight for f in formats]
            errors[site.weight] = torch.stack(rounded) if rounded else weight[None][:0]
        found = GradientRun(graph, target, sites, formats, errors)
        generator = torch.Generator().manual_seed(self.seed)
        for sample in single_sequences(samples):
            rows = found.forward(sample)
            for draw in range(self.draws):
                found.backward(drawn_loss(rows, target, generator), again=draw + 1 < self.draws)
        return found

    def _loss(
        self,
        found: GradientRun,
        site: Site,
        weight: Tensor,
        format: Format,
        noise: Mapping[Request, Tensor],
    ) -> float:
        if format.bits == 32:
            return 0.0
        loss = found.loss(site, format)
        for reader in linears(site) if noise else ():
            rows = found.squares(reader)
            variance = noise[Request.of(RoundingVariance(format.block), str(reader.args[0]))]
            if rows is not None:
                per_row = weight.double().square() @ variance
                loss += 0.5 * float(per_row @ rows)
        return loss


def groups_in_memory(sites: Sequence[Site], formats: int) -> Iterator[list[Site]]:
    """Sites whose errors fit into memory together, in order."""
    group: list[Site] = []
    held = 0
    for site in sites:
        nbytes = 4 * site.size * max(formats, 1)
        if group and held + nbytes > _ERROR_BYTES:
            yield group
            group, held = [], 0
        group.append(site)
        held += nbytes
    if group:
        yield group
