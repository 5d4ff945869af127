"""Where the relevance of a score starts: coefficients of the output, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.passes.relevance.seeds import parse_seed
from lamella.passes.scores.sweeps import Sweeps
from lamella.passes.scores.target import LossTarget, drawn_loss

DRAWN = "drawn"
"""The gradient of the loss of labels that are drawn from the model itself."""


def check_start(start: str) -> None:
    """Complain about a start that there is not.

    Raises:
        ValueError: `start` is neither ``"drawn"`` nor a seed.
    """
    if start != DRAWN:
        parse_seed(start)


@dataclass(frozen=True)
class Draws:
    """What starts are made of.

    Attributes:
        start: ``"drawn"``, or a seed as `parse_seed` reads it: then there is one for each sample.
        count: Starts per sample, where they are drawn.
        generator: Of the draws.
    """

    start: str
    count: int
    generator: torch.Generator


def seeds_of(output: Tensor, sweeps: Sweeps, target: LossTarget, draws: Draws) -> Iterator[Tensor]:
    """The seeds for one sample, of the shape of `output`; padding starts nothing.

    Args:
        output: What the model gave.
        sweeps: Knows which tokens count.
        target: What the output holds.
        draws: How many, and which.
    """
    leaf = output.detach().requires_grad_()
    count = draws.count if draws.start == DRAWN else 1
    with torch.enable_grad():
        rows = sweeps.rows(leaf)
        for draw in range(count):
            if draws.start == DRAWN:
                loss = drawn_loss(rows, target, draws.generator)
            else:
                loss = (rows * parse_seed(draws.start)(rows.detach())).sum()
            yield torch.autograd.grad(loss, leaf, retain_graph=draw + 1 < count)[0]
