"""How well an attribution says what a model looks at: metrics for relevance of any origin.

All of them take the same four things: ``score`` gives one number for each sample, ``sample`` is
what it is called with, ``relevance`` has one number for each unit of each sample (a token, a
patch), and ``remove`` takes units out of the sample. Compare with a random order and with a
bootstrap interval before you believe a difference.
"""

from __future__ import annotations

from lamella.faithfulness.correlation import faithfulness_correlation
from lamella.faithfulness.curves import Curve, Perturbation, perturbation, removal_curve
from lamella.faithfulness.erasure import Erasure, erasure
from lamella.faithfulness.intervals import Interval, bootstrap, pearson
from lamella.faithfulness.removal import Remove, Score, fill_patches, fill_tokens, patches_of

__all__ = [
    "Curve",
    "Erasure",
    "Interval",
    "Perturbation",
    "Remove",
    "Score",
    "bootstrap",
    "erasure",
    "faithfulness_correlation",
    "fill_patches",
    "fill_tokens",
    "patches_of",
    "pearson",
    "perturbation",
    "removal_curve",
]
