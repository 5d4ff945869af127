"""How much the loss hangs on what every layer reads and computes: mean squared gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.passes.base import Analyses, Analysis
from lamella.passes.scores.gradients import GradientRun, Watcher
from lamella.passes.scores.target import (
    LossTarget,
    first_sequences,
    loss_of_signs,
    loss_target,
    random_signs,
    sequence_count,
    sequence_generators,
)
from lamella.passes.sites import find_sites

PROBES = 112
"""Sequences, and backward runs, that are taken where nothing else is said; squares of single draws
spread by 1.4 times their mean, so that a mean of 112 is known to 13 %. Seven eighths of the
customary 128 samples cost less than three forward runs of all of them."""

_MOST_DRAWS = 8
"""Losses per sequence where nothing else is said: of few sequences many draws know little more."""


@dataclass(frozen=True)
class Draws:
    """Which losses are taken, and of which sequences.

    Attributes:
        sequences: How many sequences of the samples run.
        draws: Losses per sequence; None means as many as make `PROBES` with all sequences, at
            most 8.
        seed: Of the losses.

    Raises:
        ValueError: `sequences` or `draws` is smaller than 1.
    """

    sequences: int
    draws: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.sequences < 1 or (self.draws is not None and self.draws < 1):
            raise ValueError(
                f"sequences and draws must be at least 1, got {self.sequences} and {self.draws}"
            )

    def run(self, found: GradientRun, target: LossTarget, samples: Samples) -> None:
        """Run the sequences; the same draws whatever is watched."""
        taken = first_sequences(samples, self.sequences)
        count = sum(sequence_count(batch) or 1 for batch in taken)
        draws = self.draws or min(_MOST_DRAWS, math.ceil(PROBES / max(1, count)))
        generators = sequence_generators(self.seed)
        for batch in found.batches(taken):
            rows, counts = found.forward(batch)
            own = list(itertools.islice(generators, len(counts)))
            for draw in range(draws):
                signs = [
                    random_signs(n, rows.shape[1], g) for n, g in zip(counts, own, strict=True)
                ]
                loss = loss_of_signs(rows, target, torch.cat(signs))
                found.backward(loss, again=draw + 1 < draws)


@dataclass(frozen=True)
class OutputGradientsReport:
    """Sums over the tokens that a layer sees, per token of the compared output, float64.

    Attributes:
        outputs: Name of the layer -> squared gradients of its outputs, ``[out]``.
        inputs: Name of the linear layer -> squared gradients of its inputs, ``[in]``.
        counts: Name of the embedding -> how often each row is read where the loss hangs on it,
            ``[rows]``.
    """

    outputs: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]


@dataclass(frozen=True)
class OutputGradients(Analysis[OutputGradientsReport]):
    """Squared gradients at all layers that read a weight, from one run forwards and backwards.

    The losses are those of `drawn_loss`: their gradients have the Fisher matrix of the output as
    second moment.

    Attributes:
        sequences: How many sequences of the samples run.
        draws: Losses per sequence, each a backward run; None means as many as make 112 with
            all sequences, at most 8.
        seed: Of the losses.

    Raises:
        ValueError: `sequences` or `draws` is smaller than 1.
    """

    name: ClassVar[str] = "output-gradients"

    sequences: int = PROBES
    draws: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._draws()

    def run(self, graph: Graph, analyses: Analyses) -> OutputGradientsReport:
        """Run the sequences once."""
        target = loss_target(graph)
        taps = Taps()
        found = GradientRun(graph, target, find_sites(graph), [taps])
        self._draws().run(found, target, analyses.need_samples())
        return taps.report(found.tokens)

    def _draws(self) -> Draws:
        return Draws(self.sequences, self.draws, self.seed)


class Taps(Watcher):
    """Adds up squared gradients."""

    def __init__(self) -> None:
        """Nothing seen so far."""
        self._outputs: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def start(self, sequences: int) -> None:
        """Sequences count alike."""

    def outputs(self, reader: Node, read: Tensor, gradient: Tensor) -> None:
        """Add to the squares of a layer, and to the counts of an embedding."""
        _add(self._outputs, reader.name, gradient.square().sum((0, 1)).double())
        if reader.target is aten.embedding.default:
            weight: Node = reader.args[0]  # pyright: ignore[reportAssignmentType]  # sites are bound
            counted = read[gradient.abs().amax(-1) > 0]
            rows = int(weight.meta["val"].shape[0])
            _add(self._counts, reader.name, counted.bincount(minlength=rows).double())

    def inputs(self, reader: Node, read: Tensor, gradient: Tensor) -> None:
        """Add to the squares of a layer."""
        _add(self._inputs, reader.name, gradient.square().sum(0).double())

    def finish(self) -> None:
        """There is nothing to square."""

    def report(self, tokens: int) -> OutputGradientsReport:
        """What was seen, per token of the target."""
        return OutputGradientsReport(
            *(
                {name: total / max(tokens, 1) for name, total in totals.items()}
                for totals in (self._outputs, self._inputs, self._counts)
            )
        )


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    totals[name] = totals[name] + value if name in totals else value
