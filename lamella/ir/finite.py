"""Weights that hold NaN or Inf are found before anything is computed from them."""

from __future__ import annotations

import torch

from lamella.errors import GraphError
from lamella.ir import ops
from lamella.ir.graph import Graph


def check_weights(graph: Graph) -> None:
    """Refuse weights in memory that hold NaN or Inf.

    Only operands that are weights by the facts of their operator count: a mask may well be
    minus infinity. Weights that are read lazily are checked by whoever reads them.

    Raises:
        GraphError: Some do; all are named.
    """
    bad: dict[str, str] = {}
    for node in graph.nodes:
        found = ops.facts(node.target) if node.op == "call_function" else None
        for name in found.weights if found else ():
            operand = ops.bind(node).get(name)
            if not isinstance(operand, torch.fx.Node) or operand.op != "get_attr":
                continue
            if graph.is_loaded(operand) and str(operand.target) not in bad:
                count = _not_finite(graph.weight(operand))
                if count:
                    bad[str(operand.target)] = f"{operand.target} ({count} entries)"
    if bad:
        raise GraphError(
            f"weights hold NaN or Inf: {', '.join(bad.values())}; load the model again"
        )


def _not_finite(weight: torch.Tensor) -> int:
    if not weight.is_floating_point():
        return 0
    # The sum is finite unless an entry is not, or the sum overflows: then it is counted.
    if torch.isfinite(weight.sum(dtype=torch.float64)):
        return 0
    return int((~torch.isfinite(weight)).sum())
