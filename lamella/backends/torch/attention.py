"""Attention that multiplies in bfloat16.

The flash kernel of PyTorch computes heads one by one; where they are narrow it takes twice the
time of what is done here: products of many heads at once, whose scores stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lamella.backends.torch import chain_kernels as chain
from lamella.backends.torch import native

_SCORES = 3 << 18
"""Scores that are held at a time: two bytes each, they stay in the cache of two cores."""

_LONGEST = 1024
"""Keys from which on it pays to see scores one block at a time, as the flash kernel does."""

_EVERY = 8
"""Of as many keys one counts for the center."""

_LEAST, _MOST = 2.0**-100, 2.0**100
"""Sums of exponentials that neither lost a large term nor are near the end of bfloat16."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention without a causal mask: products and probabilities in bfloat16, float32 results.

    A softmax does not change when a vector is subtracted from all keys: it is the mean of some of
    them, so that scores are small and keep their precision. Exponentials are not shifted by their
    largest but divided by their sum, which is a product with a column of ones; a mask of keys
    multiplies the rows of that product. Where a sum shows that exponentials were too large or too
    small for that, the kernel of PyTorch computes everything again.

    Args:
        query: ``[batch, heads, queries, width]``.
        key: ``[batch, heads, keys, width]``.
        value: ``[batch, heads, keys, width of values]``.
        mask: Which keys count, bool ``[batch or 1, 1, 1, keys]``; for other masks, other ranks
            and more than 1024 keys the kernel of PyTorch is called.
        scale: Of the scores; None means one over the square root of the width.
    """
    if not _is_plain(query, key, value, mask):
        return _of_pytorch(query, key, value, mask, scale)
    width = query.shape[-1]
    factor = _factor(scale, width) * math.log2(math.e)
    result, sums = _weighted(query.bfloat16(), _centered(key, factor), _with_ones(value, mask))
    least, most = sums.aminmax()
    if not (float(least) > _LEAST and float(most) < _MOST):
        return _of_pytorch(query, key, value, mask, scale)
    return result


Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values."""


def attention_codes(
    heads: Heads, mask: Tensor | None, scale: float | None, grid: chain.Grid, shape: Sequence[int]
) -> Tensor:
    """Codes of `attention`, by a kernel that is compiled on this machine where it has one.

    Args:
        heads: See `attention`.
        mask: See there.
        scale: See there.
        grid: Of the codes.
        shape: What ``[batch, queries, heads, width]`` is reshaped to.
    """
    if not (_is_plain(*heads, mask) and native.takes_heads(*heads)):
        found = attention(*heads, mask, scale).transpose(1, 2).reshape(shape)
        return chain.codes_of(found, *grid)
    return native.attention(heads, mask, _factor(scale, heads[0].shape[-1]), grid).reshape(shape)


def attention_codes_of_product(  # noqa: PLR0913  (the arguments of two operators)
    codes: Tensor,
    operands: native.Operands,
    heads: native.Heads,
    mask: Tensor | None,
    scale: float | None,
    grid: chain.Grid,
    shape: tuple[int, int],
) -> Tensor:
    """As `attention_codes`, for queries, keys and values that one product gives.

    Args:
        codes: uint8, ``[..., in]``, of `shape` but for the last axis.
        operands: The weight, see `native.packed`.
        heads: Where they are in the outputs.
        mask: See `attention`.
        scale: See there.
        grid: Of the codes.
        shape: Batch and positions.
    """
    outputs, starts, count, width = heads
    factor = _factor(scale, width)
    if mask is None or _hides_keys(mask, *shape):
        return native.product_attention(codes, operands, heads, mask, factor, grid, shape)
    joined = native.product(codes, operands, outputs, ("bfloat16", 1.0, 0))
    query, key, value = (
        joined[..., start : start + count * width].reshape(*shape, count, width).transpose(1, 2)
        for start in starts
    )
    return attention_codes((query, key, value), mask, scale, grid, (*shape, count * width))


def _factor(scale: float | None, width: int) -> float:
    return 1 / math.sqrt(width) if scale is None else scale


def _is_plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    if query.ndim != 4 or not 0 < key.shape[-2] <= _LONGEST or 0 in query.shape:
        return False
    if not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return False
    return mask is None or _hides_keys(mask, query.shape[0], key.shape[-2])


def _hides_keys(mask: Tensor, batch: int, keys: int) -> bool:
    ranks = mask.ndim == 4 and mask.dtype is torch.bool
    return ranks and mask.shape[0] in (1, batch) and mask.shape[1:] == (1, 1, keys)


def _centered(key: Tensor, factor: float) -> Tensor:
    """Keys less the mean of some of them, times `factor`."""
    keys = key.bfloat16()
    center = keys[..., ::_EVERY, :].mean(-2, keepdim=True) * -factor
    held = torch.empty(keys.shape, dtype=torch.bfloat16)
    return torch.add(center, keys, alpha=factor, out=held)


def _with_ones(value: Tensor, mask: Tensor | None) -> Tensor:
    """Values with a column of ones, ``[..., keys, width + 1]``; zeros where keys do not count."""
    width = value.shape[-1]
    held = torch.empty((*value.shape[:-1], width + 1), dtype=torch.bfloat16)
    held[..., :width] = value
    held[..., width] = 1
    if mask is not None and not bool(mask.all()):
        held.mul_(mask.transpose(-1, -2))
    return held


def _weighted(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What attention gives, and the sums of exponentials; some sequences at a time."""
    batch, heads, queries, _ = query.shape
    width = values.shape[-1] - 1
    # In memory as [batch, queries, heads, width], which is how it is read.
    result = torch.empty((batch, queries, heads, width)).transpose(1, 2)
    sums = torch.empty((batch, heads, queries, 1), dtype=torch.bfloat16)
    step = max(1, _SCORES // (heads * queries * keys.shape[-2]))
    for start in range(0, batch, step):
        part = slice(start, start + step)
        scores = torch.matmul(query[part], keys[part].transpose(-1, -2)).exp2_()
        total = torch.matmul(scores, values[part])
        sums[part] = total[..., width:]
        result[part] = total[..., :width] / total[..., width:]
    return result, sums


def _of_pytorch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    wide = [one.float() for one in (query, key, value)]
    return functional.scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale)
