"""What rounding a weight costs, from one forward and one backward run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.data import Samples
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.operators import REFERENCE
from lamella.ir.ops import lam
from lamella.ir.quantize import Format
from lamella.ir.segments import Calls, Program, Values, program
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, finite
from lamella.passes.scores.error import (
    Inputs,
    errors_of,
    rounded_blocks,
    sites_with_inputs,
    squared_change,
)
from lamella.passes.scores.target import LossTarget, first_sequences, loss_target
from lamella.passes.sites import Site, find_sites


@dataclass(frozen=True)
class Fisher(BitScore):
    """The expected loss of rounding one weight, from second-order information.

    With g the gradient of the summed loss at the output of a linear layer, D the error of the
    weight and G the mean outer product of the inputs,
    ``s = 1/2 sum_n E[g_n^2] (D_n G D_n^T + sum_k W_nk^2 v_k)``; v is what the rounding of the
    inputs to 8 bits adds (`int8_activations`). For logits the labels are drawn from the model
    itself, and s estimates the KL divergence per token; for other outputs g is the mean over
    random projections of the normalized output, and s estimates ``1 - cos``.

    For an embedding, ``s = 1/2 sum_v p_v sum_k E[g_k^2] D_vk^2`` with `p_v` the frequency of a
    token in the samples, plus one occurrence for every token. A weight with several readers
    loses their sum. Activations of one batch and their gradients are in memory at a time.

    Attributes:
        formats: The formats to score.
        int8_activations: Whether the kernel rounds its input to 8 bits.
        sequences: How many sequences of the samples run.
        draws: Labels or projections per batch; None draws 1 label or 8 projections.
        seed: Of the draws.

    References:
        [Martens2015], section 2, for the factored form.
    """

    name: ClassVar[str] = "fisher"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    int8_activations: bool = True
    sequences: int = 64
    draws: int | None = None
    seed: int = 0

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Run the samples twice: with gradients, and for the Gram matrices."""
        samples = first_sequences(analyses.need_samples(), self.sequences)
        target = loss_target(graph)
        found = self._gradients(graph, target, samples)
        blocks = rounded_blocks(self.formats) if self.int8_activations else ()
        losses: dict[str, dict[Format, float]] = {}
        for site, inputs in sites_with_inputs(graph, samples, blocks):
            weight = graph.weight(site.node).float()
            losses[site.weight] = {
                f: finite(found.loss(site, weight, error, inputs, f), site.weight)
                for f, error in errors_of(weight, self.formats)
            }
        ordered = {site.weight: losses[site.weight] for site in find_sites(graph)}
        return BitScoreReport(self.name, ordered, target.unit)

    def _gradients(self, graph: Graph, target: LossTarget, samples: Samples) -> _Gradients:
        readers = [reader for site in find_sites(graph) for reader in site.readers]
        found = _Gradients(frozenset(readers))
        kept = [target.node] if target.mask is None else [target.node, target.mask]
        running = program(graph, kept)
        generator = torch.Generator().manual_seed(self.seed)
        draws = self.draws or (1 if target.kind == "logits" else 8)
        for sample in samples:
            rows = _forward(running, sample, found, target)
            found.tokens += rows.shape[0]
            found.draws = draws
            for draw in range(draws):
                loss = _drawn_loss(rows, target, generator)
                loss.backward(retain_graph=draw + 1 < draws)
        return found


@dataclass
class _Gradients:
    """What the backward runs left.

    Attributes:
        readers: Linear layers and embeddings whose outputs are watched.
        squares: Reader -> sum over rows and draws of the squared gradient, ``[out]``.
        counts: Embedding -> how often each row was read.
        tokens: Rows of the loss.
        draws: Backward runs per sample.
    """

    readers: frozenset[Node]
    squares: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    draws: int = 1

    def watch(self, node: Node, values: Values) -> None:
        """Count the rows that embeddings read, and wait for the gradient of the output."""
        if node not in self.readers:
            return
        value: Tensor = values[node]
        if not value.requires_grad:
            value = values[node] = value.detach().requires_grad_()
        value.register_hook(lambda gradient: self._add(node, gradient))
        if node.target is ops.aten.embedding.default:
            bound = ops.bind(node)
            rows = int(bound["weight"].meta["val"].shape[0])
            counted = torch.bincount(values[bound["indices"]].flatten(), minlength=rows)
            self.counts[node.name] = self.counts.get(node.name, 0) + counted

    def _add(self, node: Node, gradient: Tensor) -> None:
        squares = gradient.reshape(-1, gradient.shape[-1]).double().square().sum(0)
        self.squares[node.name] = self.squares.get(node.name, 0) + squares

    def loss(
        self,
        site: Site,
        weight: Tensor,
        error: Tensor,
        inputs: Mapping[str, Inputs],
        format: Format,
    ) -> float:
        """The loss per token of one weight in one format, summed over its readers."""
        total = 0.0
        for reader in site.readers:
            squares = self.squares.get(reader.name)
            if squares is None:
                # No gradient reaches this reader: the output does not depend on it.
                continue
            rows = squares / (self.tokens * self.draws)
            if reader.name in inputs:
                change = squared_change(error, weight, rows, inputs[reader.name], format)
            else:
                counts = self.counts[reader.name].double() + 1
                change = ((counts / counts.sum()) @ error.double().square()) @ rows
            total += 0.5 * float(change)
        return total


def _forward(
    running: Program, sample: Mapping[str, Any], found: _Gradients, target: LossTarget
) -> Tensor:
    """The rows of the target, recorded for `backward`."""
    values = running.start(sample)
    for segment in running.segments:
        weights = segment.read_weights(running.graph)
        calls = _differentiable(segment.nodes)
        segment.run(values, weights, found.watch, calls=calls, gradients=True)
    return target.rows(values)


def _differentiable(nodes: Iterable[Node]) -> Calls:
    """Our own operators have no derivative; their references in plain PyTorch have."""
    return {node: _reference(node.target) for node in nodes if node.target in REFERENCE}


def _reference(target: Any) -> Any:
    if target is not lam.linear_nbits.default:
        return REFERENCE[target]

    # The derivative of rounding is zero almost everywhere; the gradient passes by it instead.
    def without_rounding(*args: Any) -> Tensor:
        return REFERENCE[target](*args[:7], False)

    return without_rounding


def _drawn_loss(rows: Tensor, target: LossTarget, generator: torch.Generator) -> Tensor:
    """A sum over tokens whose gradients have the Fisher matrix as second moment."""
    if target.kind == "logits":
        logs = functional.log_softmax(rows.float(), dim=-1)
        labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        return -logs.gather(1, labels).sum()
    directions = functional.normalize(rows.float(), dim=-1)
    return (directions * torch.randn(rows.shape, generator=generator)).sum()
