"""Rotary embedding and state-space scans.

References:
    [Jafari2024] (MambaLRP).
"""

from __future__ import annotations

from typing import Any

from lamella.ir.ops import aten, lam
from lamella.rules.relevance.rule import Coefficients, Rule


def rotary(
    coefficient: Any, output: Any, input: Any, cos: Any, sin: Any, interleaved: bool = False
) -> Coefficients:
    """A rotation by the opposite angle; both channels of a pair have one angle."""
    back = lam.rotary_embedding.default(coefficient, cos, sin * -1.0, interleaved)
    return back, None, None, None


def selective_scan(whole: bool) -> Rule:
    """The scan backwards in time: ``G_t = c_t M_t + A_(t+1) G_(t+1)``.

    ``M_x = delta_t <b_t, G_t>``. Step sizes, `b` and `c` hang on the input but are held fixed,
    so that the scan is linear and conserves; `whole` differentiates them as well.
    """

    def rule(  # noqa: PLR0913  (the arguments of the operator)
        coefficient: Any, output: Any, input: Any, delta: Any, a: Any, b: Any, c: Any
    ) -> Coefficients:
        steps = _by_state(delta)
        rate = _of_states(a)
        decay = aten.exp.default(steps * rate)
        drives, gains = _by_channel(b), _by_channel(c)
        inflow = _by_state(coefficient)
        adjoint = _reversed_scan(decay, inflow * gains)
        reached = aten.sum.dim_IntList(adjoint * drives, [3])
        found = reached * delta
        if not whole:
            return found, None, None, None, None
        moved = _by_state(delta * input)
        states = lam.linear_scan.default(decay, moved * drives)
        of_decay = adjoint * _shifted(states) * decay
        of_delta = aten.sum.dim_IntList(of_decay * rate, [3]) + reached * input
        of_a = aten.sum.dim_IntList(of_decay * steps, [0, 2])
        driven = adjoint * moved
        read = inflow * states
        of_b, of_c = (
            aten.transpose.int(aten.sum.dim_IntList(value, [1]), 1, 2) for value in (driven, read)
        )
        return found, of_delta, of_a, of_b, of_c

    return rule


def _by_state(value: Any) -> Any:
    """``[batch, channels, sequence, 1]``."""
    return aten.unsqueeze.default(value, 3)


def _of_states(a: Any) -> Any:
    """``[1, channels, 1, states]``."""
    return aten.unsqueeze.default(aten.unsqueeze.default(a, 1), 0)


def _by_channel(value: Any) -> Any:
    """``[batch, states, sequence]`` as ``[batch, 1, sequence, states]``."""
    return aten.unsqueeze.default(aten.transpose.int(value, 1, 2), 1)


def _reversed_scan(decay: Any, update: Any) -> Any:
    """``g_t = update_t + decay_(t+1) g_(t+1)`` along the third axis."""
    later = aten.pad.default(aten.slice.Tensor(decay, 2, 1, None), [0, 0, 0, 1])
    back = (aten.flip.default(value, [2]) for value in (later, update))
    return aten.flip.default(lam.linear_scan.default(*back), [2])


def _shifted(states: Any) -> Any:
    """The state before each step; zero before the first."""
    return aten.pad.default(states, [0, 0, 1, -1])


def head_scan(whole: bool) -> Rule:
    """As `selective_scan`, for heads that decay as a whole.

    ``[batch, sequence, heads, width]`` is seen as channels ``heads * width`` whose step sizes are
    those of their head, with the states that the groups of `b` and `c` share.
    """

    def rule(  # noqa: PLR0913  (the arguments of the operator)
        coefficient: Any, output: Any, input: Any, delta: Any, a: Any, b: Any, c: Any
    ) -> Coefficients:
        batch, steps, heads, _ = input.shape
        per_group = heads // b.shape[2]
        # [batch, heads, sequence, ...], and for states of a head [batch, heads, sequence, width, n]
        paces = aten.transpose.int(delta, 1, 2)
        rate = aten.reshape.default(a, [1, heads, 1])
        decay = aten.exp.default(paces * rate)
        drives, gains = (_of_heads(value, per_group) for value in (b, c))
        inflow = aten.transpose.int(coefficient, 1, 2)
        outer = _outer(inflow, gains)
        wide = [batch, heads, steps, outer.shape[3] * outer.shape[4]]
        flat_decay = _by_state(decay)
        adjoint = _reversed_scan(flat_decay, aten.reshape.default(outer, wide))
        apart = aten.reshape.default(adjoint, list(outer.shape))
        reached = _contracted(apart, drives)
        found = aten.transpose.int(reached * _by_state(paces), 1, 2)
        if not whole:
            return found, None, None, None, None
        values = aten.transpose.int(input, 1, 2)
        driven = values * _by_state(paces)
        update = aten.reshape.default(_outer(driven, drives), wide)
        states = lam.linear_scan.default(flat_decay, update)
        of_decay = aten.sum.dim_IntList(adjoint * _shifted(states), [3]) * decay
        of_paces = of_decay * rate + aten.sum.dim_IntList(reached * values, [3])
        of_a = aten.sum.dim_IntList(of_decay * paces, [0, 2])
        of_drives = _contracted_width(apart, driven)
        of_gains = _contracted_width(aten.reshape.default(states, list(outer.shape)), inflow)
        shape = [batch, steps, b.shape[2], per_group, b.shape[3]]
        of_b, of_c = (
            aten.sum.dim_IntList(aten.reshape.default(aten.transpose.int(value, 1, 2), shape), [3])
            for value in (of_drives, of_gains)
        )
        return found, aten.transpose.int(of_paces, 1, 2), of_a, of_b, of_c

    return rule


def _of_heads(value: Any, repeats: int) -> Any:
    """``[batch, sequence, groups, states]`` as ``[batch, heads, sequence, states]``."""
    wide = value if repeats == 1 else aten.repeat_interleave.self_int(value, repeats, 2)
    return aten.transpose.int(wide, 1, 2)


def _outer(left: Any, right: Any) -> Any:
    """``[..., width]`` and ``[..., states]`` to ``[..., width, states]``."""
    return aten.unsqueeze.default(left, 4) * aten.unsqueeze.default(right, 3)


def _contracted(apart: Any, states: Any) -> Any:
    """``[..., width, states]`` times ``[..., states]``, summed over the states."""
    return aten.squeeze.dim(aten.matmul.default(apart, aten.unsqueeze.default(states, 4)), 4)


def _contracted_width(apart: Any, values: Any) -> Any:
    """``[..., width, states]`` times ``[..., width]``, summed over the width."""
    return aten.squeeze.dim(aten.matmul.default(aten.unsqueeze.default(values, 3), apart), 3)
