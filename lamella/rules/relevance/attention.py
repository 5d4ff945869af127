"""Softmax and attention.

The fused operator has its rule before any decomposition: the probabilities are computed again
from queries and keys, with the mask as it is, so that no memory of the size of the scores is
kept between the forward and the sweep.

References:
    [Achtibat2024] (plain softmax, shares 1/4, 1/4, 1/2), [Ali2022] (attention as a constant);
    `methods/relevance.md`, section 3.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lamella.ir.ops import aten
from lamella.rules.relevance.broadcast import sum_to, times
from lamella.rules.relevance.contraction import transposed
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
        if isinstance(many, int) and isinstance(few, int) and many != few:
            repeats = many // few
        if repeats > 1:
            key = aten.repeat_interleave.self_int(key, repeats, key.ndim - 3)
            value = aten.repeat_interleave.self_int(value, repeats, value.ndim - 3)
        return cls(query, key, value, repeats)

    def back(self, coefficient: Any, operand: Any) -> Any:
        """The coefficient of keys or values before they were repeated."""
        if self.repeats > 1:
            shape = list(coefficient.shape)
            shape[-3:-2] = [shape[-3] // self.repeats, self.repeats]
            apart = aten.reshape.default(coefficient, shape)
            coefficient = aten.sum.dim_IntList(apart, [len(shape) - 3])
        return sum_to(coefficient, operand)


@dataclass(frozen=True)
class _Options:
    mask: Any
    is_causal: bool
    scale: float


def attention(query_share: float, key_share: float, value_share: float) -> Rule:
    """Attention whose operands get shares of the plain adjoint; a share of 0 is nothing."""

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
        options = _Options(attn_mask, is_causal, factor)
        weights = _probabilities(heads, options)
        of_value = None
        if value_share:
            product = aten.matmul.default(transposed(weights), times(coefficient, value_share))
            of_value = heads.back(product, value)
        of_query = of_key = of_mask = None
        if query_share or key_share:
            scores = _scores_coefficient(coefficient, output, weights, heads)
            of_mask = _mask_coefficient(scores, attn_mask)
            scores = times(scores, factor * query_share)
            of_query = sum_to(aten.matmul.default(scores, heads.key), query)
            scores = times(scores, key_share / query_share)
            of_key = heads.back(aten.matmul.default(transposed(scores), query), key)
        return of_query, of_key, of_value, of_mask, None, None, None, None

    return rule


def _probabilities(heads: _Heads, options: _Options) -> Any:
    """The softmax of the masked scores; zero where everything is masked, never NaN."""
    query = times(heads.query, options.scale)
    scores = aten.matmul.default(query, transposed(heads.key))
    least = torch.finfo(scores.dtype).min
    mask = options.mask
    if options.is_causal:
        rows = _count(scores.shape[-2])
        mask = aten.le.Tensor(_count(scores.shape[-1]), aten.unsqueeze.default(rows, 1))
    if mask is None:
        return aten.softmax.int(scores, -1)
    if mask.dtype == torch.bool:
        allowed = mask
        scores = aten.where.ScalarOther(allowed, scores, least)
    else:
        allowed = mask > -math.inf
        scores = aten.clamp.default(scores + mask, least)
    return aten.where.ScalarOther(allowed, aten.softmax.int(scores, -1), 0.0)


def _count(size: Any) -> Any:
    return aten.arange.start_step(0, size, 1, dtype=torch.int64)


def _scores_coefficient(coefficient: Any, output: Any, weights: Any, heads: _Heads) -> Any:
    """``P (M V^T - <M, o>)``; the sum over the keys is taken over the width of the output."""
    of_weights = aten.matmul.default(coefficient, transposed(heads.value))
    total = aten.sum.dim_IntList(coefficient * output, [output.ndim - 1], True)
    return weights * (of_weights - total)


def _mask_coefficient(scores: Any, mask: Any) -> Any:
    if mask is None or mask.dtype == torch.bool:
        return None
    return sum_to(scores, mask)


Attention = Callable[..., Coefficients]
