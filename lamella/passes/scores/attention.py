"""Attention for backward runs: as plain products where its probabilities are few."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lamella.ir.ops import aten

_MOST_KEYS = 128
"""Probabilities of attention to as many are kept for the backward run, which takes four products
then. The fused kernel keeps none and takes five; it is faster where there are many."""


def attention(  # noqa: PLR0913  (the arguments of the operator)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The operator of ATen, `scaled_dot_product_attention`, by the same arguments."""
    if is_causal and key.shape[-2] <= _MOST_KEYS:
        attn_mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if key.shape[-2] > _MOST_KEYS or _hides_everything(attn_mask) or dropout_p:
        fused = aten.scaled_dot_product_attention.default
        more = {"scale": scale, "enable_gqa": enable_gqa}
        return fused(query, key, value, attn_mask, dropout_p, is_causal, **more)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        share = query.shape[-3] // key.shape[-3]
        key, value = (one.repeat_interleave(share, -3) for one in (key, value))
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.mT
    if attn_mask is not None:
        scores = scores + _added(attn_mask, scores.dtype)
    return scores.softmax(-1) @ value


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores; booleans are True for what is seen."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


def _hides_everything(mask: Tensor | None) -> bool:
    """Whether some query sees no key; its probabilities are for the operator to say."""
    if mask is None:
        return False
    seen = mask if mask.dtype == torch.bool else mask.detach() > -math.inf
    return not bool(seen.any(-1).all())
