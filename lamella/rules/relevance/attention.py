"""Softmax and attention.

The fused operator has its rule before any decomposition: the probabilities are computed again
from queries and keys, with the mask as it is, so that no memory of the size of the scores is
kept between the forward and the sweep.

References:
    [Achtibat2024] (plain softmax, shares 1/4, 1/4, 1/2), [Ali2022] (attention as a constant).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lamella.ir.adjoint_attention import probabilities, scores_adjoint
from lamella.ir.ops import aten, lam
from lamella.rules.relevance.broadcast import is_one, sum_to, times
from lamella.rules.relevance.rule import Coefficients, Rule


def softmax(coefficient: Any, output: Any, self: Any, dim: int, dtype: Any = None) -> Coefficients:
    """The plain adjoint, ``p (M - sum p M)``: the softmax absorbs a part."""
    kept = output * coefficient
    total = aten.sum.dim_IntList(kept, [dim], True)
    found = kept - output * total
    return aten.to.dtype(found, self.dtype) if found.dtype != self.dtype else found, None, None


def log_softmax(
    coefficient: Any, output: Any, self: Any, dim: int, dtype: Any = None
) -> Coefficients:
    """The plain adjoint; better start from the logits."""
    total = aten.sum.dim_IntList(coefficient, [dim], True)
    found = coefficient - aten.exp.default(output) * total
    return aten.to.dtype(found, self.dtype) if found.dtype != self.dtype else found, None, None


@dataclass(frozen=True)
class _Heads:
    """Queries, keys and values with as many heads as there are queries."""

    query: Any
    key: Any
    value: Any
    repeats: int

    @classmethod
    def of(cls, query: Any, key: Any, value: Any) -> _Heads:
        many, few = query.shape[-3], key.shape[-3]
        repeats = 1
        if isinstance(many, int) and isinstance(few, int) and many != few and few > 1:
            repeats = many // few
        if repeats > 1:
            key = aten.repeat_interleave.self_int(key, repeats, key.ndim - 3)
            value = aten.repeat_interleave.self_int(value, repeats, value.ndim - 3)
        query, key, value = _expanded(query, key, value)
        return cls(query, key, value, repeats)

    def back(self, coefficient: Any, operand: Any) -> Any:
        """The coefficient of keys or values before they were repeated."""
        if self.repeats > 1:
            shape = list(coefficient.shape)
            shape[-3:-2] = [shape[-3] // self.repeats, self.repeats]
            apart = aten.reshape.default(coefficient, shape)
            coefficient = aten.sum.dim_IntList(apart, [len(shape) - 3])
        return sum_to(coefficient, operand)


def _expanded(*operands: Any) -> tuple[Any, ...]:
    """Operands with the same axes before the last two; sizes that vary are alike already."""
    axes = range(operands[0].ndim - 2)
    ones = [axis for axis in axes if len({is_one(x.shape[axis]) for x in operands}) > 1]
    if not ones:
        return operands
    shape = list(operands[0].shape)
    for axis in ones:
        shape[axis] = next(x.shape[axis] for x in operands if not is_one(x.shape[axis]))
    lead = shape[:-2]
    return tuple(aten.expand.default(x, [*lead, *x.shape[-2:]]) for x in operands)


def attention(query_share: float, key_share: float, value_share: float) -> Rule:
    """Attention whose operands get shares of the plain adjoint; a share of 0 is nothing.

    Either only the values have a share, or all three do.
    """

    def rule(  # noqa: PLR0913  (the arguments of the operator)
        coefficient: Any,
        output: Any,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Any = None,
        enable_gqa: bool = False,
    ) -> Coefficients:
        heads = _Heads.of(query, key, value)
        factor = 1 / math.sqrt(int(query.shape[-1])) if scale is None else float(scale)
        options = (attn_mask, is_causal, factor)
        if not query_share:
            found = lam.attention_value_adjoint.default(
                coefficient, heads.query, heads.key, *options
            )
            of_value = heads.back(times(found, value_share), value)
            return None, None, of_value, *(None,) * 5
        read = (output, heads.query, heads.key, heads.value)
        plain = lam.attention_adjoint.default(coefficient, *read, *options)
        of_query = sum_to(times(plain[0], query_share), query)
        of_key = heads.back(times(plain[1], key_share), key)
        of_value = heads.back(times(plain[2], value_share), value)
        of_mask = _mask_coefficient(coefficient, output, heads, options)
        return of_query, of_key, of_value, of_mask, None, None, None, None

    return rule


def _mask_coefficient(coefficient: Any, output: Any, heads: _Heads, options: Any) -> Any:
    """What is added to the scores has their coefficient, the plain adjoint of the softmax."""
    mask = options[0]
    if mask is None or mask.dtype == torch.bool:
        return None
    weights = probabilities(heads.query, heads.key, *options)
    return sum_to(scores_adjoint(coefficient, output, weights, heads.value), mask)
