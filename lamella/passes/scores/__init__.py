"""Scores: what blocks, branches and weights are worth, asked for by name."""

from lamella.passes.scores.base import BitScore, BitScoreReport, Score, ScoreReport
from lamella.passes.scores.registry import BIT_SCORES, SCORES, bit_score, score

__all__ = [
    "BIT_SCORES",
    "SCORES",
    "BitScore",
    "BitScoreReport",
    "Score",
    "ScoreReport",
    "bit_score",
    "score",
]
