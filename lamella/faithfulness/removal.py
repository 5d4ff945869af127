"""Units of a sample, and taking them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]
"""From samples ``[batch, ...]`` to one number each, ``[batch]``: a probability, a logit."""

Remove = Callable[[Tensor, Tensor], Tensor]
"""From samples, and which units of each go, to samples of the same shape."""


def fill_tokens(filler: int) -> Remove:
    """Tokens become `filler`: a mask or padding token, which the model has seen in training.

    Units are the places of ``[batch, tokens]``.
    """
    return lambda sample, gone: sample.masked_fill(gone, filler)


def fill_patches(size: int, fill: float | Tensor | Callable[[Tensor], Tensor]) -> Remove:
    """Square patches of images take the place of what `fill` says.

    Units are the patches of ``[batch, channels, height, width]``, row by row.

    Args:
        size: Height and width of a patch, which divide those of the image.
        fill: A number, a tensor that broadcasts to the images, or a function of the images
            (a blur).

    Raises:
        ValueError: `size` does not divide the images.
    """

    def remove(sample: Tensor, gone: Tensor) -> Tensor:
        rows, columns = _grid(sample, size)
        chosen = gone.reshape(-1, 1, rows, columns)
        chosen = chosen.repeat_interleave(size, 2).repeat_interleave(size, 3)
        other = fill(sample) if callable(fill) else fill
        return torch.where(chosen, torch.as_tensor(other, dtype=sample.dtype), sample)

    return remove


def patches_of(
    relevance: Tensor,
    size: int,
    pool: Literal["mean", "max"] = "mean",
) -> Tensor:
    """One number for each patch: channels are summed, pixels pooled.

    Raises:
        ValueError: `size` does not divide the images, or `pool` is another word.
    """
    if pool not in ("mean", "max"):
        raise ValueError(f"pool must be 'mean' or 'max', got {pool!r}")
    rows, columns = _grid(relevance, size)
    blocks = relevance.sum(1).reshape(-1, rows, size, columns, size)
    pooled = blocks.mean((2, 4)) if pool == "mean" else blocks.amax((2, 4))
    return pooled.flatten(1)


def check_units(sample: Tensor, relevance: Tensor) -> None:
    """Refuse relevance that is not one finite number for each unit of each sample.

    Raises:
        ValueError: It isn't; the message says what was expected.
    """
    if relevance.ndim != 2 or relevance.shape[0] != sample.shape[0] or not relevance.shape[1]:
        raise ValueError(
            f"relevance must have shape [{sample.shape[0]}, units], got {list(relevance.shape)}; "
            f"sum over the width of embeddings, or pool pixels with patches_of"
        )
    if not bool(relevance.isfinite().all()):
        raise ValueError("relevance holds numbers that are not finite")


def _grid(images: Tensor, size: int) -> tuple[int, int]:
    height, width = images.shape[-2:]
    if images.ndim != 4 or size < 1 or height % size or width % size:
        raise ValueError(
            f"patches of {size} don't tile images of shape {list(images.shape)}; height and "
            f"width of [batch, channels, height, width] must be multiples"
        )
    return height // size, width // size
