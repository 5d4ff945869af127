"""Rules of products of two values, by the roles of the factors.

A product is homogeneous of degree two: its adjoint counts relevance twice. How the share of each
factor is chosen is a `Shares` function; the shares of a product of `n` signals are ``1/n`` each,
however the product is associated.

References:
    [Achtibat2024] (halves), [Ali2022] (gates), [Jafari2024] (state-space layers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from lamella.ir.ops import aten, facts
from lamella.rules.relevance.broadcast import sum_to, times
from lamella.rules.relevance.contraction import transposed
from lamella.rules.relevance.roles import Role
from lamella.rules.relevance.rule import Chosen, Coefficients, Place, Rule

Shares = Callable[[Place, Any, Any], tuple[float, float]]
"""From a place and two factors to the share of the adjoint that each gets; 0 is nothing."""

_ACTIVATIONS = frozenset(
    {
        *(aten.silu.default, aten.gelu.default, aten.relu.default, aten.tanh.default),
        *(aten.sigmoid.default, aten.hardsigmoid.default, aten.mish.default),
        *(aten.hardswish.default, aten.elu.default, aten.leaky_relu.default),
    }
)
_SELF_GATES = frozenset({aten.sigmoid.default, aten.hardsigmoid.default})


def whole(place: Place, left: Any, right: Any) -> tuple[float, float]:
    """The plain adjoint: a product of two signals doubles relevance."""
    return 1.0, 1.0


def by_role(gates_stop: bool, drive_takes_all: bool = False) -> Shares:
    """Shares that conserve, by the roles of the factors.

    In this order: a constant leaves all to the other factor; so does a norm; so does the gate
    ``h(a)`` of ``a * h(a)``; with `drive_takes_all`, what drives a state-space layer takes all
    but where an activation gates it; with `gates_stop`, a gate (or the activation of a gated
    unit) leaves all to a signal. What is left is shared equally by all signals of the product.
    """

    def shares(place: Place, left: Any, right: Any) -> tuple[float, float]:
        roles = place.role(left), place.role(right)
        if not (roles[0].carries and roles[1].carries):
            return 1.0, 1.0
        for loses in (
            tuple(role is Role.NORM for role in roles),
            (_is_gate_of(left, right), _is_gate_of(right, left)),
            _beside_drive(roles, left, right) if drive_takes_all else (False, False),
            _gates(roles, left, right) if gates_stop else (False, False),
        ):
            if loses == (True, False):
                return 0.0, 1.0
            if loses == (False, True):
                return 1.0, 0.0
        count = _factors(left, place), _factors(right, place)
        return count[0] / sum(count), count[1] / sum(count)

    return shares


def _gates(roles: tuple[Role, Role], left: Any, right: Any) -> tuple[bool, bool]:
    made = tuple(role in (Role.GATE, Role.STEP) for role in roles)
    if made[0] != made[1]:
        return made[0], made[1]
    return _is_activation(left), _is_activation(right)


def _beside_drive(roles: tuple[Role, Role], left: Any, right: Any) -> tuple[bool, bool]:
    drive = roles[0] is Role.DRIVE, roles[1] is Role.DRIVE
    if drive[0] == drive[1] or _is_activation(right if drive[0] else left):
        return False, False
    return drive[1], drive[0]


def _is_activation(value: Any) -> bool:
    while isinstance(value, Node) and value.target is aten.to.dtype:
        value = value.args[0]
    return isinstance(value, Node) and value.target in _ACTIVATIONS


def _is_gate_of(gate: Any, value: Any) -> bool:
    """Whether `gate` is a squashing of `value`, perhaps scaled by a number."""
    if not isinstance(gate, Node) or gate.target not in _SELF_GATES:
        return False
    inner: Any = gate.args[0]
    scaled = isinstance(inner, Node) and inner.target is aten.mul.Tensor
    if scaled and not isinstance(inner.args[1], Node):
        return value is inner or value is inner.args[0]
    return value is inner


def _factors(value: Any, place: Place) -> int:
    """How many signals a factor is the product of, if nothing else reads it."""
    if not isinstance(value, Node) or value.target is not aten.mul.Tensor or len(value.users) > 1:
        return 1
    left, right = value.args[0], value.args[1]
    if not (place.role(left).carries and place.role(right).carries):
        return 1
    return _factors(left, place) + _factors(right, place)


# ---- the operators -----------------------------------------------------------------------


def mul(share: float, other_share: float) -> Rule:
    """``M_a = s b M`` and ``M_b = t a M``."""

    def rule(coefficient: Any, output: Any, self: Any, other: Any) -> Coefficients:
        first = sum_to(times(coefficient * other, share), self) if share else None
        if not hasattr(other, "shape") or not other_share:
            return first, None
        return first, sum_to(times(coefficient * self, other_share), other)

    return rule


def matmul(share: float, other_share: float) -> Rule:
    """``M_A = s M B^T`` and ``M_B = t A^T M``; vectors are matrices with one row or column."""

    def rule(coefficient: Any, output: Any, self: Any, other: Any) -> Coefficients:
        left = aten.unsqueeze.default(self, 0) if self.ndim == 1 else self
        right = aten.unsqueeze.default(other, 1) if other.ndim == 1 else other
        if self.ndim == 1:
            coefficient = aten.unsqueeze.default(coefficient, coefficient.ndim - _column(other))
        if other.ndim == 1:
            coefficient = aten.unsqueeze.default(coefficient, coefficient.ndim)
        first = second = None
        if share:
            product = aten.matmul.default(times(coefficient, share), transposed(right))
            first = _shaped(sum_to(product, left), self)
        if other_share:
            product = aten.matmul.default(transposed(left), times(coefficient, other_share))
            second = _shaped(sum_to(product, right), other)
        return first, second

    return rule


def _column(other: Any) -> int:
    return 0 if other.ndim == 1 else 1


def _shaped(value: Any, like: Any) -> Any:
    return value if value.ndim == like.ndim else aten.reshape.default(value, list(like.shape))


def einsum(*shares: float) -> Rule:
    """For each operand the sum of products of the others with the coefficient."""

    def rule(
        coefficient: Any, output: Any, equation: str, tensors: Any, path: Any = None
    ) -> Coefficients:
        left, _, result = equation.replace(" ", "").partition("->")
        terms = left.split(",")
        given = list(tensors)
        found = [
            _einsum_of(place, times(coefficient, shares[place]), terms, result, given)
            if shares[place]
            else None
            for place in range(len(terms))
        ]
        return None, found, None

    return rule


def _einsum_of(place: int, coefficient: Any, terms: list[str], result: str, given: Any) -> Any:
    wanted = terms[place]
    others = [term for index, term in enumerate(terms) if index != place]
    values = [value for index, value in enumerate(given) if index != place]
    known = set(result).union(*others)
    # An index that only this operand has was summed over: its coefficient is repeated there.
    kept = "".join(letter for letter in wanted if letter in known)
    found = aten.einsum.default(f"{','.join([result, *others])}->{kept}", [coefficient, *values])
    shape = list(given[place].shape)
    for axis, letter in enumerate(wanted):
        if letter not in known:
            found = aten.unsqueeze.default(found, axis)
    return found if kept == wanted else aten.expand.default(found, shape)


def divide(coefficient: Any, output: Any, self: Any, other: Any) -> Coefficients:
    """``M_a = M / b``; the divisor gets nothing."""
    return sum_to(coefficient / other, self), None


def divide_plain(coefficient: Any, output: Any, self: Any, other: Any) -> Coefficients:
    """The plain adjoint, which gives the divisor the negative of what the dividend gets."""
    first = coefficient / other
    if not hasattr(other, "shape"):
        return sum_to(first, self), None
    return sum_to(first, self), sum_to(first * output * -1.0, other)


# ---- entries of a table -------------------------------------------------------------------


def mul_by(shares: Shares) -> Chosen:
    """The rule of `mul` with the shares that the place gives."""

    def choose(place: Place) -> Rule:
        return mul(*shares(place, place.operand("self"), place.operand("other")))

    return Chosen(choose)


def matmul_by(shares: Shares) -> Chosen:
    """The rule of `matmul` likewise."""

    def choose(place: Place) -> Rule:
        return matmul(*shares(place, place.operand("self"), place.operand("other")))

    return Chosen(choose)


def einsum_by(shares: Shares) -> Chosen:
    """The rule of `einsum` likewise; more than two signals share equally."""

    def choose(place: Place) -> Rule:
        tensors = list(place.operand("tensors"))
        if len(tensors) == 1:
            return einsum(1.0)
        if len(tensors) == 2:
            return einsum(*shares(place, *tensors))
        signals = sum(place.role(tensor).carries for tensor in tensors)
        return einsum(*([1.0 / signals] * len(tensors)))

    return Chosen(choose)


def is_product(node: Node) -> bool:
    """Whether a node multiplies matrices."""
    found = facts(node.target)
    return found is not None and found.category == "contraction"
