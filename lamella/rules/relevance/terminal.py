"""Rules for the first layer, which give relevance of an input of the model, no coefficient.

References:
    [Montavon2017] (z^B and w^2), [Bach2015] (flat).
"""

from __future__ import annotations

from typing import Any

from lamella.ir.ops import aten
from lamella.rules.relevance.broadcast import full_like
from lamella.rules.relevance.contraction import Opened
from lamella.rules.relevance.rule import Coefficients, Rule, Terminal


def box(opened: Opened, low: float, high: float, stabilizer: float = 1e-6) -> Rule:
    """The z^B rule for inputs in ``[low, high]``, in the units that the model sees.

    ``R_x = sum_j (c_ij - l w+ - h w-) R_j / d_j``, where `d` is the sum of the numerators; the
    bias gets nothing.

    Args:
        opened: The layer.
        low: At most 0.
        high: At least 0.
        stabilizer: Keeps `d` away from zero, with its sign.

    Raises:
        ValueError: 0 is not between the bounds.
    """
    if not low <= 0.0 <= high:
        raise ValueError(f"the box must hold 0, got low={low} and high={high}")

    def rule(
        coefficient: Any, output: Any, input: Any, weight: Any, bias: Any = None, *rest: Any
    ) -> Coefficients:
        layer = opened(*rest)
        size = aten.abs.default(weight)
        ones = full_like(input, 1.0)
        # l w+ + h w- = (l + h) / 2 w + (l - h) / 2 |w|
        middle, reach = (low + high) / 2, (low - high) / 2
        bounds = layer.forward(ones * middle, weight, None) + layer.forward(
            ones * reach, size, None
        )
        total = layer.forward(input, weight, None) - bounds
        quotient = output * coefficient / stabilized(total, stabilizer)
        straight = layer.adjoint(quotient, weight, input)
        signed = layer.adjoint(quotient, size, input)
        relevance = straight * (input - middle) - signed * reach
        return (Terminal(relevance), None, None, *(None,) * len(rest))

    return rule


def squared_weights(opened: Opened, stabilizer: float = 1e-6) -> Rule:
    """The w^2 rule: relevance in proportion to ``w_ij^2``, whatever the input."""
    return _by_weight(opened, stabilizer, lambda weight: weight * weight)


def flat(opened: Opened, stabilizer: float = 1e-6) -> Rule:
    """Relevance in equal parts to all inputs of a window."""
    return _by_weight(opened, stabilizer, lambda weight: full_like(weight, 1.0))


def _by_weight(opened: Opened, stabilizer: float, measure: Any) -> Rule:
    def rule(
        coefficient: Any, output: Any, input: Any, weight: Any, bias: Any = None, *rest: Any
    ) -> Coefficients:
        layer = opened(*rest)
        measured = measure(weight)
        total = layer.forward(full_like(input, 1.0), measured, None)
        quotient = output * coefficient / (total + stabilizer)
        relevance = layer.adjoint(quotient, measured, input)
        return (Terminal(relevance), None, None, *(None,) * len(rest))

    return rule


def stabilized(value: Any, stabilizer: float) -> Any:
    """`value` moved away from zero in the direction of its sign; zero counts as positive."""
    return aten.where.self(value < 0, value - stabilizer, value + stabilizer)
