"""The adjoints of attention, as operators that keep no scores of the whole batch.

Attention is ``o = P v`` with ``P = softmax(scale q k^T + mask)``. With the coefficient `M` of
the result, ``M_v = P^T M``; with ``S = P (M v^T - <M, o>)``, ``M_q = scale S k`` and
``M_k = scale S^T q``. The kernels take a few heads at a time, so that what they hold beside
operands and results stays small, however long the sequence and large the batch.

References:
    [Dao2022], appendix B.2: the sums over the keys are taken over the width of the output.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lamella.ir.operators import define

aten = torch.ops.aten

_HELD_BYTES = 1 << 21
"""Scores that a kernel holds at once, where one head is not larger: what a core's cache holds."""


def probabilities(query: Any, key: Any, attn_mask: Any, is_causal: bool, scale: float) -> Any:
    """The softmax of the masked scores; zero where everything is masked, never NaN.

    A plain tensor function of operators of ATen; values that a graph computes do as well.

    Args:
        query: ``[..., rows, width]``.
        key: ``[..., keys, width]``, with as many heads.
        attn_mask: Boolean (True is seen) or what is added, broadcastable to the scores; or None.
        is_causal: Whether a row sees only the keys up to its own place.
        scale: Factor of the products.
    """
    turned = aten.transpose.int(key, key.ndim - 2, key.ndim - 1)
    scores = aten.matmul.default(query if scale == 1.0 else query * scale, turned)
    if is_causal:
        rows = _count(scores.shape[-2])
        attn_mask = aten.le.Tensor(_count(scores.shape[-1]), aten.unsqueeze.default(rows, 1))
    if attn_mask is None:
        return aten.softmax.int(scores, -1)
    least = torch.finfo(scores.dtype).min
    if attn_mask.dtype == torch.bool:
        allowed = attn_mask
        scores = aten.where.ScalarOther(allowed, scores, least)
    else:
        allowed = attn_mask > -math.inf
        scores = aten.clamp.default(scores + attn_mask, least)
    return aten.where.ScalarOther(allowed, aten.softmax.int(scores, -1), 0.0)


def _count(size: Any) -> Any:
    return aten.arange.start_step(0, size, 1, dtype=torch.int64)


def scores_adjoint(coefficient: Any, output: Any, weights: Any, value: Any) -> Any:
    """``S = P (M v^T - <M, o>)``, the coefficient of the scores; as `probabilities`."""
    turned = aten.transpose.int(value, value.ndim - 2, value.ndim - 1)
    of_weights = aten.matmul.default(coefficient, turned)
    total = aten.sum.dim_IntList(coefficient * output, [output.ndim - 1], True)
    return weights * (of_weights - total)


def attention_adjoint(  # noqa: PLR0913  (the arguments of the operator)
    coefficient: Tensor,
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients of queries, keys and values by the plain adjoint.

    Args:
        coefficient: Of the result, as `output`.
        output: ``[..., rows, width of values]``.
        query: ``[..., rows, width]``.
        key: ``[..., keys, width]``; with as many heads as `query`.
        value: ``[..., keys, width of values]``, likewise.
        attn_mask: As for `probabilities`.
        is_causal: Likewise.
        scale: Likewise.
    """
    weights = probabilities(query, key, attn_mask, is_causal, scale)
    of_value = weights.mT @ coefficient
    scores = scores_adjoint(coefficient, output, weights, value) * scale
    return scores @ key, scores.mT @ query, of_value


def attention_value_adjoint(
    coefficient: Tensor,
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The coefficient of the values alone, where the probabilities are constants."""
    return probabilities(query, key, attn_mask, is_causal, scale).mT @ coefficient


def _adjoint_in_parts(  # noqa: PLR0913  (the arguments of the operator)
    coefficient: Tensor,
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention_adjoint`, some heads at a time."""
    if query.ndim != 4:
        more = (attn_mask, is_causal, scale)
        found = attention_adjoint(coefficient, output, query, key, value, *more)
        return found[0].contiguous(), found[1].contiguous(), found[2].contiguous()
    results = tuple(map(torch.empty_like, (query, key, value)))
    for part in _parts(query, key):
        m, k, v = (each[part].contiguous() for each in (coefficient, key, value))
        q = torch.mul(query[part], scale, out=query.new_empty(query[part].shape))
        weights = probabilities(q, k, _cut(attn_mask, part), is_causal, 1.0)
        results[2][part] = weights.mT @ m
        of_weights = (m @ v.mT).sub_((m * output[part]).sum(-1, keepdim=True))
        scores = weights.mul_(of_weights)
        results[0][part] = (scores @ k).mul_(scale)
        results[1][part] = scores.mT @ q
    return results[0], results[1], results[2]


def _value_adjoint_in_parts(
    coefficient: Tensor,
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """As `attention_value_adjoint`, some heads at a time."""
    if query.ndim != 4:
        more = (attn_mask, is_causal, scale)
        return attention_value_adjoint(coefficient, query, key, *more).contiguous()
    result = _of_values(coefficient, key)
    for part in _parts(query, key):
        mask = _cut(attn_mask, part)
        weights = probabilities(query[part], key[part], mask, is_causal, scale)
        result[part] = weights.mT @ coefficient[part]
    return result


def _of_values(coefficient: Tensor, key: Tensor) -> Tensor:
    return key.new_empty((*key.shape[:-1], coefficient.shape[-1]))


def _parts(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of the batch and heads whose scores are held at once."""
    batch, heads = query.shape[:2]
    of_head = query.shape[2] * key.shape[2] * query.element_size()
    abreast = max(1, _HELD_BYTES // max(of_head, 1))
    rows, columns = max(1, abreast // heads), min(heads, abreast)
    starts = itertools.product(range(0, batch, rows), range(0, heads, columns))
    return ((slice(row, row + rows), slice(head, head + columns)) for row, head in starts)


def _cut(mask: Tensor | None, part: tuple[slice, slice]) -> Tensor | None:
    """The part of a mask that belongs to some rows and heads."""
    if mask is None or mask.ndim < 3:
        return mask
    whole = slice(None)
    heads = whole if mask.shape[-3] == 1 else part[1]
    if mask.ndim == 3:
        return mask[heads]
    return mask[whole if mask.shape[0] == 1 else part[0], heads]


def _fake_adjoint(
    coefficient: Tensor, output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    layout = torch.preserve_format if query.ndim == 4 else torch.contiguous_format
    of_query, of_key, of_value = (
        torch.empty_like(each, memory_format=layout) for each in (query, key, value)
    )
    return of_query, of_key, of_value


define(
    "attention_adjoint(Tensor coefficient, Tensor output, Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_mask, bool is_causal, float scale) -> (Tensor, Tensor, Tensor)",
    _adjoint_in_parts,
    _fake_adjoint,
)
define(
    "attention_value_adjoint(Tensor coefficient, Tensor query, Tensor key, Tensor? attn_mask, "
    "bool is_causal, float scale) -> Tensor",
    _value_adjoint_in_parts,
    lambda coefficient, query, key, *_: _of_values(coefficient, key),
)

ATTENTION_REFERENCE: Mapping[Callable[..., object], Callable[..., Any]] = MappingProxyType(
    {
        torch.ops.lamella.attention_adjoint.default: attention_adjoint,
        torch.ops.lamella.attention_value_adjoint.default: attention_value_adjoint,
    }
)
"""Each operator -> the same in plain PyTorch."""
