"""The scores by name, as in ``by=lim``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lamella.errors import RecipeError, closest
from lamella.ir.quantize import Format
from lamella.passes.scores.base import BitScore, Level, Score
from lamella.passes.scores.error import OutputError, WeightError
from lamella.passes.scores.fisher import Fisher
from lamella.passes.scores.fisher_gram import FisherGram
from lamella.passes.scores.hawq import Hawq, HawqEigenvalue
from lamella.passes.scores.kl import MeasuredKl
from lamella.passes.scores.lrp_qvit import LrpQvit
from lamella.passes.scores.prior import (
    EndsBits,
    EntropyBits,
    LimBits,
    OwlBits,
    RandomBits,
    SimilarityBits,
    SizeBits,
    ZdBits,
)
from lamella.passes.scores.relevance import RelevanceScore
from lamella.passes.scores.relevance_bits import RelevanceBits
from lamella.passes.scores.structure import (
    LimScore,
    RandomScore,
    SimilarityScore,
    SizeScore,
    ZdScore,
)

SCORES: Mapping[str, Callable[..., Score]] = MappingProxyType(
    {
        c.name: c
        for c in (LimScore, ZdScore, SimilarityScore, RelevanceScore, SizeScore, RandomScore)
    }
)
"""What blocks and branches are dropped by."""

BIT_SCORES: Mapping[str, Callable[..., BitScore]] = MappingProxyType(
    {
        c.name: c
        for c in (
            Fisher,
            FisherGram,
            RelevanceBits,
            LrpQvit,
            MeasuredKl,
            Hawq,
            HawqEigenvalue,
            OutputError,
            WeightError,
            LimBits,
            ZdBits,
            EntropyBits,
            OwlBits,
            EndsBits,
            SimilarityBits,
            SizeBits,
            RandomBits,
        )
    }
)
"""What bits are given by."""


def score(by: str, level: Level = "block", *, seed: int = 0) -> Score:
    """The score called `by`.

    Args:
        by: One of `SCORES`.
        level: Blocks or branches.
        seed: Of scores that draw at random; the others have none.

    Raises:
        RecipeError: There is no such score; the message names those there are.
    """
    return _build(SCORES, by, "of blocks and branches", {"level": level, "seed": seed})


def bit_score(by: str, formats: Sequence[Format], *, seed: int = 0) -> BitScore:
    """The score called `by`, for these formats.

    Args:
        by: One of `BIT_SCORES`.
        formats: The formats to score.
        seed: Of scores that draw at random; the others have none.

    Raises:
        RecipeError: There is no such score; the message names those there are.
    """
    return _build(BIT_SCORES, by, "of weights", {"formats": tuple(formats), "seed": seed})


def _build(
    known: Mapping[str, Callable[..., Any]], by: str, what: str, options: Mapping[str, Any]
) -> Any:
    if by not in known:
        raise RecipeError(
            f"there is no score {what} called {by!r}{closest(by, known)} "
            f"(there are {', '.join(known)})"
        )
    made: Any = known[by]
    fields = {field.name for field in dataclasses.fields(made)}
    return made(**{name: value for name, value in options.items() if name in fields})
