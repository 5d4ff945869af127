"""How well an attribution says what a model looks at: metrics for relevance of any origin.

Curves, erasure and the correlation take the same four things: ``score`` gives one number for
each sample, ``sample`` is what it is called with, ``relevance`` has one number for each unit of
each sample (a token, a patch), and ``remove`` takes units out of the sample. Compare with a
random order and with a bootstrap interval before you believe a difference.

Patching looks inside of a model: `activation_patching` measures what single activations do to a
metric, `relevance_patching` estimates all of them from one sweep, and `patching_agreement` says
how well that went.
"""

from __future__ import annotations

from lamella.faithfulness.activation_patching import activation_patching
from lamella.faithfulness.correlation import faithfulness_correlation
from lamella.faithfulness.curves import Curve, Perturbation, perturbation, removal_curve
from lamella.faithfulness.erasure import Erasure, erasure
from lamella.faithfulness.intervals import Interval, bootstrap, pearson, resampled
from lamella.faithfulness.patch_effects import PatchEffects, patching_agreement
from lamella.faithfulness.patch_sites import PatchSite, patch_sites
from lamella.faithfulness.relevance_patching import relevance_patching
from lamella.faithfulness.removal import Remove, Score, fill_patches, fill_tokens, patches_of

__all__ = [
    "Curve",
    "Erasure",
    "Interval",
    "PatchEffects",
    "PatchSite",
    "Perturbation",
    "Remove",
    "Score",
    "activation_patching",
    "bootstrap",
    "erasure",
    "faithfulness_correlation",
    "fill_patches",
    "fill_tokens",
    "patch_sites",
    "patches_of",
    "patching_agreement",
    "pearson",
    "perturbation",
    "relevance_patching",
    "removal_curve",
    "resampled",
]
