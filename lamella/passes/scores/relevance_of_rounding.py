"""What rounding the result of an operation does to the output, for all operations and widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.passes.base import Analyses, Analysis
from lamella.passes.relevance.request import MASKED
from lamella.passes.relevance.taps import is_float
from lamella.passes.scores.base import Meaning, finite
from lamella.passes.scores.starts import DRAWN, Draws, all_seeds, check_options
from lamella.passes.scores.sweeps import Sweeps
from lamella.passes.scores.target import first_sequences, loss_target
from lamella.rules.relevance.presets import Preset, preset_of


@dataclass(frozen=True)
class RoundingScores:
    """What the output changes when one result is rounded; a larger value means more.

    Attributes:
        by: Name of the score.
        bits: The widths.
        effects: Name of an operation -> ``sqrt(E <Q_b(a) - a, M>^2)`` for each width: errors of
            all entries together, with their signs.
        spreads: The same for ``sqrt(E sum ((Q_b(a) - a) M)^2)``: as if errors had no common
            direction, which needs fewer samples.
        unit: Of both.
    """

    by: str
    bits: tuple[int, ...]
    effects: Mapping[str, tuple[float, ...]] = field(repr=False)
    spreads: Mapping[str, tuple[float, ...]] = field(repr=False)
    unit: str = "output"

    @property
    def higher_means(self) -> Meaning:
        """A larger effect says that the operation is sensitive."""
        return "sensitive"

    def order(self, bits: int) -> tuple[str, ...]:
        """The operations, the least sensitive to `bits` first.

        Raises:
            ValueError: The width was not asked for.
        """
        if bits not in self.bits:
            raise ValueError(f"{bits} bits were not scored; there are {self.bits}")
        place = self.bits.index(bits)
        return tuple(sorted(self.effects, key=lambda name: self.effects[name][place]))


@dataclass(frozen=True)
class RelevanceOfRounding(Analysis[RoundingScores]):
    """The first-order effect of rounding what an operation computes: ``<Q_b(a) - a, M>``.

    `a` is the result of an operation, `M` its coefficient, and `Q_b` rounds every row (along the
    last axis) to `b` bits with a scale of its own, ``max|a| / (2^(b-1) - 1)``, half to even;
    numbers that hide something from a softmax stay. One forward run of each sequence and one
    sweep for each start give all operations in all widths. Operations that no relevance reaches
    are left out. Weights are scored by `RelevanceBits`.

    Attributes:
        bits: The widths, 2 to 16.
        preset: Name of the rules, or a preset.
        start: As in `RelevanceScore`.
        sequences: How many sequences of the samples run, one at a time.
        draws: Starts per sequence, where they are drawn.
        seed: Of the draws.

    Raises:
        ValueError: An option has another value.

    References:
        [Jafari2025], with the rounded value as the value in the other run.
    """

    name: ClassVar[str] = "relevance-of-rounding"

    bits: tuple[int, ...] = (4, 8)
    preset: str | Preset = "gradient"
    start: str = DRAWN
    sequences: int = 32
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self.preset, self.start, self.sequences, self.draws)
        if not self.bits or not all(2 <= width <= 16 for width in self.bits):
            raise ValueError(f"bits must be widths of 2 to 16, got {self.bits}")

    def run(self, graph: Graph, analyses: Analyses) -> RoundingScores:
        """Run the sequences one by one, and relevance backwards.

        Raises:
            SamplesError: There are no samples.
            GraphError: No output is a distribution or a vector.
        """
        samples = first_sequences(analyses.need_samples(), self.sequences)
        target = loss_target(graph)
        names = [node.name for node in graph.nodes if _computes(node)]
        sweeps = Sweeps(graph, preset_of(self.preset), target, names, names)
        squares: dict[str, Tensor] = {}
        starts = 0

        def seen(name: str, coefficient: Tensor) -> None:
            found = self._squares(sweeps.value(name), coefficient)
            squares[name] = squares[name] + found if name in squares else found

        draws = Draws.of(self.start, self.draws, self.seed)
        for _, seed in all_seeds(samples, sweeps, target, draws):
            sweeps.backward(seed, seen)
            starts += 1
        roots = {name: (squares[name] / starts).sqrt() for name in names if name in squares}
        for name, root in roots.items():
            finite(float(root.sum()), name)
        effects, spreads = (
            {name: tuple(root[row].tolist()) for name, root in roots.items()} for row in (0, 1)
        )
        return RoundingScores(self.name, self.bits, effects, spreads)

    def _squares(self, value: Tensor, coefficient: Tensor) -> Tensor:
        """Squared effect, and the sum of squared parts of it, ``[2, widths]``."""
        seen = value.abs() < MASKED
        wide = torch.where(seen, value, 0.0).double()
        found: list[Tensor] = []
        for width in self.bits:
            parts = (_rounded(wide, width) - wide) * coefficient.double()
            found.append(torch.stack((parts.sum().square(), parts.square().sum())))
        return torch.stack(found, dim=1)


def _rounded(value: Tensor, bits: int) -> Tensor:
    """Every row to codes of so many bits, symmetric around zero."""
    step = value.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    step = torch.where(step == 0, 1.0, step)
    return (value / step).round() * step


def _computes(node: Node) -> bool:
    return node.op == "call_function" and is_float(node) and node.meta["val"].ndim > 0
