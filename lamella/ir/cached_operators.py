"""The operators of Lamella that continue from what earlier calls left in a cache.

Each takes the state after the tokens of the past and gives the state after the new ones too, so
that one graph serves the prompt, a single new token, and the verification of several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lamella.ir.operators import define, scan_heads


def cached_attention(  # noqa: PLR0913  (the arguments of the operator)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of new queries over the keys and values of past and new tokens.

    Query `i` of `new` stands at position ``past + i`` and sees the keys at positions up to its
    own, with `window` only the last `window` of them, and of those the ones that `mask` allows.
    With scales the cache holds codes of 8 bits, and new rows are rounded before they are read:
    ``clip(round(x / scale), -128, 127)``, half to even.

    Args:
        query: ``[batch, heads, new, width]``.
        key: ``[batch, kv_heads, new, width]``; `heads` is a multiple of `kv_heads`.
        value: ``[batch, kv_heads, new, value_width]``.
        past_key: ``[batch, kv_heads, past, width]``; `past` may be 0. int8 with scales.
        past_value: ``[batch, kv_heads, past, value_width]``, likewise.
        mask: ``[batch, past + new]``, nonzero where a key may be seen; None hides no key.
        bias: Added to the scores, broadcastable to ``[batch, heads, new, past + new]``.
        scale: What the products of queries and keys are multiplied by.
        window: How many keys a query sees at most, its own included; 0 means all.
        softcap: Scores become ``softcap * tanh(score / softcap)`` before mask and bias; 0 means
            they stay as they are.
        key_scale: What a code of a key stands for, ``[kv_heads, 1, width]``; None means that the
            cache holds keys as they are.
        value_scale: The same for values, ``[kv_heads, 1, value_width]``.

    Returns:
        The result, ``[batch, heads, new, value_width]``, and the keys and values of past and
        new tokens, as the past is given. A query that sees no key gives zeros.
    """
    kept_keys = torch.cat((past_key, _kept(key, key_scale)), dim=2)
    kept_values = torch.cat((past_value, _kept(value, value_scale)), dim=2)
    keys, values = _read(kept_keys, key_scale), _read(kept_values, value_scale)
    seen = _seen(query.shape[2], keys.shape[2], window, query.device)
    if mask is not None:
        seen = seen & mask.bool()[:, None, None, :]
    if softcap:
        result = _softcapped(query, keys, values, seen, bias, scale, softcap)
        return result, kept_keys, kept_values
    allowed = seen if bias is None else torch.where(seen, bias, float("-inf"))
    result = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=allowed, scale=scale, enable_gqa=True
    )
    # A row without a key is zero in some kernels and NaN in others.
    result = result.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return result, kept_keys, kept_values


def _kept(rows: Tensor, scale: Tensor | None) -> Tensor:
    """New rows as the cache holds them."""
    if scale is None:
        return rows
    return (rows / scale).round().clamp(-128, 127).to(torch.int8)


def _read(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Rows of the cache as attention reads them."""
    return rows if scale is None else rows * scale


def _seen(new: int, total: int, window: int, device: torch.device) -> Tensor:
    """Which key a query sees by its position alone, ``[1, 1, new, total]``."""
    queries = torch.arange(total - new, total, device=device)[:, None]
    keys = torch.arange(total, device=device)[None]
    seen = keys <= queries
    if window:
        seen = seen & (keys > queries - window)
    return seen[None, None]


def _softcapped(  # noqa: PLR0913  (the parts of attention)
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    groups = query.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(groups, dim=1, output_size=query.shape[1])
    values = values.repeat_interleave(groups, dim=1, output_size=query.shape[1])
    scores = torch.matmul(query * scale, keys.transpose(2, 3))
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    result = torch.matmul(weights, values)
    return result.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def cached_selective_scan(
    input: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of `lamella::selective_scan` from a given state, and the state after it.

    Args:
        input: ``[batch, channels, new]``.
        delta: Step sizes, as `input`.
        a: ``[channels, states]``, negative.
        b: ``[batch, states, new]``.
        c: As `b`.
        state: ``[batch, channels, states]``; zeros at the start of a sequence.

    Returns:
        ``[batch, channels, new]`` and ``[batch, channels, states]``.
    """
    decay = torch.exp(delta.unsqueeze(-1) * a[None, :, None, :])
    update = (delta * input).unsqueeze(-1) * b.transpose(1, 2).unsqueeze(1)
    outputs: list[Tensor] = []
    for step in range(input.shape[-1]):
        state = decay[:, :, step] * state + update[:, :, step]
        outputs.append(torch.matmul(state, c[:, :, step].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=-1), state


def cached_head_scan(
    input: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence of `lamella::head_scan` from a given state, and the state after it.

    Args:
        input: ``[batch, new, heads, width]``.
        delta: ``[batch, new, heads]``.
        a: ``[heads]``, negative.
        b: ``[batch, new, groups, states]``; `heads` is a multiple of `groups`.
        c: As `b`.
        state: ``[batch, heads, width, states]``; zeros at the start of a sequence.

    Returns:
        ``[batch, new, heads, width]`` and ``[batch, heads, width, states]``.
    """
    return scan_heads(input, delta, a, b, c, state)


def _fake_cached_scan(
    input: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    plain = torch.contiguous_format
    return torch.empty_like(input, memory_format=plain), torch.empty_like(
        state, memory_format=plain
    )


def _fake_cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    *_: object,
    **__: object,
) -> tuple[Tensor, Tensor, Tensor]:
    total = past_key.shape[2] + key.shape[2]
    return (
        query.new_empty((*query.shape[:3], value.shape[3])),
        past_key.new_empty((*key.shape[:2], total, key.shape[3])),
        past_value.new_empty((*value.shape[:2], total, value.shape[3])),
    )


define(
    "cached_attention(Tensor query, Tensor key, Tensor value, Tensor past_key, Tensor past_value, "
    "Tensor? mask, Tensor? bias, float scale, int window=0, float softcap=0.0, "
    "Tensor? key_scale=None, Tensor? value_scale=None) "
    "-> (Tensor, Tensor, Tensor)",
    cached_attention,
    _fake_cached_attention,
)
define(
    "cached_selective_scan(Tensor input, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor state) "
    "-> (Tensor, Tensor)",
    cached_selective_scan,
    _fake_cached_scan,
)
define(
    "cached_head_scan(Tensor input, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor state) "
    "-> (Tensor, Tensor)",
    cached_head_scan,
    _fake_cached_scan,
)

CACHED_REFERENCE: Mapping[Callable[..., object], Callable[..., object]] = MappingProxyType(
    {
        torch.ops.lamella.cached_attention.default: cached_attention,
        torch.ops.lamella.cached_selective_scan.default: cached_selective_scan,
        torch.ops.lamella.cached_head_scan.default: cached_head_scan,
    }
)
"""Each operator of this module -> the same in plain PyTorch."""
