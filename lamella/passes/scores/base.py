"""What a score is: a number per block, branch or weight, with its unit and its direction.

Half of the published scores point the other way; a report therefore says what a higher value
means, and `ScoreReport.order` is the only way to sort by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from lamella.ir.quantize import Format
from lamella.passes.base import Analysis
from lamella.passes.scores.interactions import Interactions

Level = Literal["block", "sublayer"]
Meaning = Literal["important", "dispensable", "sensitive"]


@dataclass(frozen=True)
class ScoreReport:
    """A score of every block or every branch.

    Attributes:
        by: Name of the score.
        level: What is scored.
        values: Name of the block or branch -> score, in the order of the stream.
        unit: Of the values.
        higher_means: What a larger value says of its target.
    """

    by: str
    level: Level
    values: Mapping[str, float]
    unit: str
    higher_means: Meaning

    def order(self) -> tuple[str, ...]:
        """The names, the most dispensable first; ties stay in the order of the stream."""
        sign = -1.0 if self.higher_means == "dispensable" else 1.0
        return tuple(sorted(self.values, key=lambda name: sign * self.values[name]))

    def importance(self) -> dict[str, float]:
        """The values turned so that larger means more important."""
        sign = -1.0 if self.higher_means == "dispensable" else 1.0
        return {name: sign * value for name, value in self.values.items()}


@dataclass(frozen=True)
class BitScoreReport:
    """What every weight loses in every format; lower is better, always.

    Attributes:
        by: Name of the score.
        losses: Name of the weight -> format -> loss. A weight that stays as it is loses 0.
        unit: ``"KL per token"``, ``"cosine distance per token"``, or ``"relative"`` for scores
            that order but do not predict.
        measured: Whether every loss was measured rather than estimated.
        remarks: What was estimated another way, and why.
        interactions: What several weights lose together, where the score knows.
    """

    by: str
    losses: Mapping[str, Mapping[Format, float]]
    unit: str
    measured: bool = False
    remarks: tuple[str, ...] = ()
    interactions: Interactions | None = field(default=None, compare=False, repr=False)

    @property
    def higher_means(self) -> Meaning:
        """A larger loss says that the weight is sensitive."""
        return "sensitive"

    def order(self, format: Format) -> tuple[str, ...]:
        """The weights, the one that loses least in `format` first."""
        return tuple(sorted(self.losses, key=lambda name: self.losses[name][format]))


class Score(Analysis[ScoreReport]):
    """A score for `drop-blocks` and `drop-sublayers`.

    Subclasses are frozen dataclasses whose first field is ``level``.

    Attributes:
        levels: What it can score.
        meaning: What a larger value means.
    """

    levels: ClassVar[tuple[Level, ...]] = get_args(Level)
    meaning: ClassVar[Meaning]


class BitScore(Analysis[BitScoreReport]):
    """A score for `allocate-bits`. Subclasses are frozen dataclasses with ``formats`` first.

    Attributes:
        needs_samples: Whether it runs the samples.
    """

    needs_samples: ClassVar[bool] = False


def finite(value: float, what: str) -> float:
    """`value`, after a check that it is a number.

    Raises:
        ValueError: It is NaN or infinite: a weight or an activation must be.
    """
    if not math.isfinite(value):
        raise ValueError(f"the score of {what} is {value}; look for NaN or Inf in its weights")
    return value
