"""Where the relevance of a score starts, and how often: one sequence after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.data import Samples
from lamella.passes.relevance.seeds import parse_seed
from lamella.passes.scores.sweeps import Sweeps
from lamella.passes.scores.target import (
    LossTarget,
    drawn_loss,
    sequence_generators,
    single_sequences,
)
from lamella.rules.relevance.presets import Preset, preset_of

DRAWN = "drawn"
"""The gradient of the loss of labels that are drawn from the model itself."""


def check_options(preset: str | Preset, start: str, sequences: int, draws: int) -> None:
    """Complain about options that scores by relevance have in common.

    Raises:
        ValueError: The preset is unknown, `start` is neither ``"drawn"`` nor a seed, or a number
            is smaller than 1.
    """
    preset_of(preset)
    if start != DRAWN:
        parse_seed(start)
    if sequences < 1 or draws < 1:
        raise ValueError(f"sequences and draws must be at least 1, got {sequences} and {draws}")


@dataclass(frozen=True)
class Draws:
    """What starts are made of.

    Attributes:
        start: ``"drawn"``, or a seed as `parse_seed` reads it: then there is one for each sample.
        count: Starts per sample, where they are drawn.
        generators: One for each sequence.
    """

    start: str
    count: int
    generators: Iterator[torch.Generator]

    @classmethod
    def of(cls, start: str, count: int, seed: int) -> Draws:
        """Draws that a seed decides."""
        return cls(start, count, sequence_generators(seed))

    @property
    def per_sequence(self) -> int:
        """Starts per sequence."""
        return self.count if self.start == DRAWN else 1


def all_seeds(
    samples: Samples, sweeps: Sweeps, target: LossTarget, draws: Draws
) -> Iterator[tuple[int | None, Tensor]]:
    """Run the sequences one by one; for each its seeds.

    Yields:
        How many tokens count of a sequence that has just run, or None at its other seeds; and
        the coefficient of the output.
    """
    for sample in single_sequences(samples):
        output = sweeps.forward(sample)
        tokens = len(sweeps.rows(output))
        for draw, seed in enumerate(seeds_of(output, sweeps, target, draws)):
            yield None if draw else tokens, seed


def seeds_of(output: Tensor, sweeps: Sweeps, target: LossTarget, draws: Draws) -> Iterator[Tensor]:
    """The seeds for one sample, of the shape of `output`; padding starts nothing.

    Args:
        output: What the model gave.
        sweeps: Knows which tokens count.
        target: What the output holds.
        draws: How many, and which.
    """
    leaf = output.detach().requires_grad_()
    count, generator = draws.per_sequence, next(draws.generators)
    with torch.enable_grad():
        rows = sweeps.rows(leaf)
        for draw in range(count):
            if draws.start == DRAWN:
                loss = drawn_loss(rows, target, generator)
            else:
                loss = (rows * parse_seed(draws.start)(rows.detach())).sum()
            yield torch.autograd.grad(loss, leaf, retain_graph=draw + 1 < count)[0]
