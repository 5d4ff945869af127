"""What every canonical operator costs: operations and bytes as expressions of the sizes."""

from __future__ import annotations

from lamella.rules.cost_contraction import CONTRACTING, LAYERS
from lamella.rules.cost_elementwise import ELEMENTWISE, MOVING, REDUCING, CostRule
from lamella.rules.table import RuleTable

COST: RuleTable[CostRule] = RuleTable(
    "cost", {**ELEMENTWISE, **MOVING, **REDUCING, **CONTRACTING, **LAYERS}
)
"""The cost rules."""
