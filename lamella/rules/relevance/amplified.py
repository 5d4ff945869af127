"""The rules gamma, z+ and alpha-beta, each by three products instead of eight to ten.

With ``c_ij = x_i w_ij`` and one more product ``a = |x||W|``, the positive and negative parts of
every sum are ``p = (z + a) / 2`` and ``n = (z - a) / 2``. The weights of the adjoint split the
same way, so that no product of clipped weights is needed.

Where no input can be negative, ``p = x W+`` directly: z+ takes two products. So does gamma where
only a relu reads the sums: negative ones have no relevance, and the positive ones are those of
the layer with the weights ``W + g W+``.

References:
    [Montavon2019] (gamma), [Andeol2021] (its signed form), [Bach2015], equation 60 (alpha-beta).
    The identities are ours.
"""

from __future__ import annotations

from typing import Any

import torch

from lamella.ir.ops import aten
from lamella.rules.relevance.broadcast import times
from lamella.rules.relevance.contraction import Contraction, Opened
from lamella.rules.relevance.rule import Chosen, Coefficients, Place, Rule
from lamella.rules.relevance.signs import feeds_only_relu, is_nonnegative


def gamma(opened: Opened, factor: float) -> Rule:
    """The signed gamma rule: contributions of the sign of the sum count ``1 + factor`` times.

    ``rho = z / (z + g p)`` for positive sums, ``z / (z + g n)`` for negative ones, in [0, 1];
    ``M_x = (1 + g/2) W^T (M rho) + g/2 sgn(x) |W|^T (M rho sgn(z))``. The bias is one more
    contribution. Conserves exactly without bias.

    Raises:
        ValueError: `factor` is negative.
    """
    if factor < 0:
        raise ValueError(f"gamma must be at least 0, got {factor}")

    def rule(
        coefficient: Any, output: Any, input: Any, weight: Any, bias: Any = None, *rest: Any
    ) -> Coefficients:
        layer = opened(*rest)
        # (1 + g/2) rho = |z| / (|z| + h a) with h = (g/2) / (1 + g/2); zero where both are.
        share = factor / (2 + factor)
        absolute = _absolute(layer, input, weight, bias)
        grown = aten.abs.default(output) + absolute * share
        kept = output / (grown + _least(output.dtype))
        parts = (coefficient * aten.abs.default(kept), coefficient * kept)
        found, of_bias = _both(layer, parts, (input, weight, bias), share)
        return (found, None, of_bias, *(None,) * len(rest))

    return rule


def alpha_beta(opened: Opened, alpha: float, beta: float, stabilizer: float = 1e-6) -> Rule:
    """The alpha-beta rule, ``alpha p / p - beta n / n``; z+ is ``alpha = 1, beta = 0``.

    With ``R = z M``, ``u = alpha R/p - beta R/n`` and ``v = alpha R/p + beta R/n``:
    ``M_x = W^T u / 2 + sgn(x) |W|^T v / 2``. Where one sign is absent a part of the relevance
    has nowhere to go; `stabilizer` (in units of the output) keeps the quotients finite there.

    Raises:
        ValueError: ``alpha - beta`` is not one.
    """
    if abs(alpha - beta - 1.0) > 1e-9:
        raise ValueError(f"alpha - beta must be 1, got alpha={alpha} and beta={beta}")

    def rule(
        coefficient: Any, output: Any, input: Any, weight: Any, bias: Any = None, *rest: Any
    ) -> Coefficients:
        layer = opened(*rest)
        size = _absolute(layer, input, weight, bias)
        relevance = output * coefficient
        # Half of R / (p + stabilizer) is R / (z + a + 2 stabilizer).
        positive = times(relevance, alpha) / (output + size + 2 * stabilizer)
        if beta:
            negative = times(relevance, beta) / (output - size - 2 * stabilizer)
            parts = (positive - negative, positive + negative)
        else:
            parts = (positive, positive)
        found, of_bias = _both(layer, parts, (input, weight, bias))
        return (found, None, of_bias, *(None,) * len(rest))

    return rule


def gamma_above_zero(opened: Opened, factor: float) -> Rule:
    """`gamma` where no input is negative and sums below zero have no relevance.

    With ``W' = W + g W+`` and the bias likewise, ``M_x = W'^T (M z / (x W' + b'))``.
    """

    def rule(
        coefficient: Any, output: Any, input: Any, weight: Any, bias: Any = None, *rest: Any
    ) -> Coefficients:
        layer = opened(*rest)
        raised = _raised(weight, factor)
        total = layer.forward(input, raised, None if bias is None else _raised(bias, factor))
        total = aten.clamp.default(total, _least(output.dtype))
        kept = coefficient * output / total
        found = layer.adjoint(kept, raised, input)
        of_bias = None
        if bias is not None:
            more = aten.to.dtype(bias > 0, bias.dtype) * factor + 1.0
            of_bias = layer.bias_sum(kept) * more
        return (found, None, of_bias, *(None,) * len(rest))

    return rule


def z_plus_of_positive(opened: Opened, stabilizer: float = 1e-6) -> Rule:
    """z+ where no input is negative: ``M_x = W+^T (R / (x W+ + b+))``."""

    def rule(
        coefficient: Any, output: Any, input: Any, weight: Any, bias: Any = None, *rest: Any
    ) -> Coefficients:
        layer = opened(*rest)
        positive = aten.clamp.default(weight, 0.0)
        above = None if bias is None else aten.clamp.default(bias, 0.0)
        total = layer.forward(input, positive, above) + stabilizer
        kept = output * coefficient / total
        found = layer.adjoint(kept, positive, input)
        of_bias = None
        if bias is not None:
            of_bias = layer.bias_sum(kept) * aten.to.dtype(bias > 0, bias.dtype)
        return (found, None, of_bias, *(None,) * len(rest))

    return rule


def gamma_by_signs(opened: Opened, factor: float) -> Chosen:
    """`gamma`, in the form that takes the fewest products at a place."""
    general, special = gamma(opened, factor), gamma_above_zero(opened, factor)

    def choose(place: Place) -> Rule:
        above = is_nonnegative(place.operand("input")) and feeds_only_relu(place.node)
        return special if above else general

    return Chosen(choose)


def alpha_beta_by_signs(
    opened: Opened, alpha: float, beta: float, stabilizer: float = 1e-6
) -> Chosen:
    """`alpha_beta`, in the form that takes the fewest products at a place."""
    general, special = alpha_beta(opened, alpha, beta, stabilizer), None
    if not beta:
        special = z_plus_of_positive(opened, stabilizer)

    def choose(place: Place) -> Rule:
        return special if special and is_nonnegative(place.operand("input")) else general

    return Chosen(choose)


def _raised(weight: Any, factor: float) -> Any:
    """``W + g W+``.

    Factors stand apart here: compiled by inductor, `alpha` of a sum gave other numbers.
    """
    return weight + aten.clamp.default(weight, 0.0) * factor


def _absolute(layer: Contraction, input: Any, weight: Any, bias: Any) -> Any:
    """``|x||W| + |b|``."""
    of_bias = None if bias is None else aten.abs.default(bias)
    return layer.forward(aten.abs.default(input), aten.abs.default(weight), of_bias)


def _both(
    layer: Contraction, parts: tuple[Any, Any], operands: tuple[Any, Any, Any], share: float = 1.0
) -> Any:
    """``W^T s + share sgn(x) |W|^T t``, and the same for the bias."""
    straight, signed = parts
    input, weight, bias = operands
    first = layer.adjoint(straight, weight, input)
    second = layer.adjoint(signed, aten.abs.default(weight), input)
    found = first + times(second * aten.sign.default(input), share)
    if bias is None:
        return found, None
    sums = layer.bias_sum(straight), layer.bias_sum(signed)
    return found, sums[0] + sums[1] * aten.sign.default(bias) * share


def _least(dtype: torch.dtype) -> float:
    """A number that is nothing beside any sum, but no zero."""
    info = torch.finfo(dtype)
    return info.tiny if info.tiny < 1e-30 else info.tiny * info.eps
