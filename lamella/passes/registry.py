"""The passes that Lamella brings along.

The lists are explicit: importing a module registers nothing. A new pass is added here, or
comes from another distribution by entry point (see `lamella.plugins`).
"""

from __future__ import annotations

from typing import Any

from lamella.passes.analyses.activation_entropy import ActivationEntropy
from lamella.passes.analyses.branch_similarity import BranchSimilarity
from lamella.passes.analyses.cost import Cost
from lamella.passes.analyses.latency import Latency
from lamella.passes.analyses.layer_input_modification import LayerInputModification
from lamella.passes.analyses.outlier_ratio import OutlierRatio
from lamella.passes.analyses.pareto import Pareto
from lamella.passes.analyses.relevance import Relevance
from lamella.passes.analyses.spikes import Spikes
from lamella.passes.analyses.z_score_distribution import ZScoreDistribution
from lamella.passes.base import Analysis, Transform
from lamella.passes.scores.integer_products import IntegerProducts
from lamella.passes.scores.relevance_of_parts import RelevanceOfParts
from lamella.passes.scores.relevance_of_rounding import RelevanceOfRounding
from lamella.passes.transforms.allocate_bits import AllocateBits
from lamella.passes.transforms.blend_weights import BlendWeights
from lamella.passes.transforms.drop_blocks import DropBlocks
from lamella.passes.transforms.drop_sublayers import DropSublayers
from lamella.passes.transforms.fix_ranges import FixRanges
from lamella.passes.transforms.fold_norms import FoldNorms
from lamella.passes.transforms.fold_scales import FoldScales
from lamella.passes.transforms.follow_plan import FollowPlan
from lamella.passes.transforms.quantize_activations import QuantizeActivations
from lamella.passes.transforms.quantize_cache import QuantizeCache
from lamella.passes.transforms.quantize_convolutions import QuantizeConvolutions
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from lamella.passes.transforms.restore_blocks import RestoreBlocks
from lamella.passes.transforms.rotate_stream import RotateStream

TRANSFORMS: tuple[type[Transform], ...] = (
    FoldNorms,
    FoldScales,
    RotateStream,
    DropBlocks,
    DropSublayers,
    AllocateBits,
    FollowPlan,
    QuantizeWeights,
    QuantizeConvolutions,
    QuantizeCache,
    FixRanges,
    QuantizeActivations,
    BlendWeights,
    RestoreBlocks,
)
"""The built-in transforms, in the order in which they are listed."""

ANALYSES: tuple[type[Analysis[Any]], ...] = (
    Cost,
    Latency,
    BranchSimilarity,
    LayerInputModification,
    ActivationEntropy,
    OutlierRatio,
    Spikes,
    Pareto,
    Relevance,
    RelevanceOfParts,
    RelevanceOfRounding,
    IntegerProducts,
    ZScoreDistribution,
)
"""The built-in analyses, in the order in which they are listed."""
