"""Why a model gave an answer: relevance of its inputs, blocks and heads."""

from __future__ import annotations

from lamella.explanation.explaining import explain, explainer
from lamella.explanation.result import Explanation, Ledger

__all__ = ["Explanation", "Ledger", "explain", "explainer"]
