"""Caches as buffers, and the sequences in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from lamella.backends.decoder import State, check_crop
from lamella.backends.onnxruntime.session import Bound
from lamella.ir.cache import CacheLayout, Slot

_ROWS_AT_ONCE = 64


@final
class Buffers(State):
    """Sequences whose rows lie at the front of buffers, without gaps.

    Tokens that a mask hides may have no row: then `seen` says which tokens have one.

    Attributes:
        capacity: Rows of a buffer.
        past: What the next call reads, a tensor for each slot: ``[batch, kv_heads, capacity,
            width]`` for those that grow.
        present: What it writes: the same tensor where a slot grows, another where it doesn't.
        filled: Rows of each sequence.
        seen: Which tokens have a row, ``[batch, length]``; None means all.
        offsets: Position of the token in the first row of each sequence; None before the first.
        once: The inputs that stay, by name.
        general: The same sequences in the hands of another decoder, from the moment when this
            one could not go on; None until then.
        side: Which of two tensors is the past of a slot that doesn't grow, 0 or 1.
        ready: The bound calls for one new token, by `side`.
    """

    def __init__(self, layout: CacheLayout, batch: int, once: Mapping[str, Tensor]) -> None:
        """Sequences without tokens, and buffers without rows."""
        super().__init__(batch)
        self.capacity = 0
        self.slots: Sequence[Slot] = layout.slots
        self._turns = not all(slot.grows for slot in layout.slots)
        self.past = [_zeros(slot, batch, 0) for slot in layout.slots]
        self.present = [
            old if slot.grows else old.clone()
            for slot, old in zip(layout.slots, self.past, strict=True)
        ]
        self.filled = [0] * batch
        self.seen: Tensor | None = None
        self.offsets: list[int] | None = None
        self.once = dict(once)
        self.general: State | None = None
        self.side = 0
        self.ready: dict[int, Bound] = {}

    @property
    def is_plain(self) -> bool:
        """Whether every token has the row of its position."""
        alone = self.general is None and self.seen is None
        return alone and not any(self.offsets or ())

    def make_room(self, rows: int, limit: int | None) -> None:
        """Have buffers of at least `rows` rows; what is in them is copied when they grow."""
        if rows <= self.capacity:
            return
        wanted = max(rows, 2 * self.capacity)
        wanted = -(-wanted // _ROWS_AT_ONCE) * _ROWS_AT_ONCE
        self.capacity = max(rows, wanted if limit is None else min(wanted, limit))
        self._replace(range(self.batch))

    def turn(self) -> None:
        """What was written is what the next call reads."""
        if self._turns:
            self.past, self.present = self.present, self.past
            self.side = 1 - self.side

    def keep(self, sequences: slice) -> None:
        """What was written for some sequences is what the next call reads for them."""
        for slot, old, new in zip(self.slots, self.past, self.present, strict=True):
            if not slot.grows:
                old[sequences] = new[sequences]

    def add(self, seen: Tensor | None, counts: Sequence[int], new: int) -> None:
        """New tokens have their rows: `counts` of each sequence, `seen` ones if not all."""
        if seen is not None or self.seen is not None:
            before = torch.ones(self.batch, self.length, dtype=torch.bool)
            now = torch.ones(self.batch, new, dtype=torch.bool)
            parts = (before if self.seen is None else self.seen, now if seen is None else seen)
            self.seen = torch.cat(parts, dim=1)
        self.filled = [rows + count for rows, count in zip(self.filled, counts, strict=True)]

    def reorder(self, indices: Tensor) -> None:
        """Pick the sequences in every buffer; a batch that stays as large stays in place."""
        order = [int(index) for index in indices]
        if order == list(range(self.batch)):
            return
        if self.general is not None:
            self.general.reorder(indices)
        elif len(order) == self.batch:
            self._move(indices)
        else:
            self._replace(order)
        self.once = {name: value.index_select(0, indices) for name, value in self.once.items()}
        if self.once:
            self.ready.clear()
        self.filled = [self.filled[index] for index in order]
        self.seen = None if self.seen is None else self.seen[indices]
        self.offsets = None if self.offsets is None else [self.offsets[i] for i in order]
        self.batch = len(order)

    def crop(self, length: int) -> None:
        """Forget rows; the numbers stay in the buffers until they are overwritten."""
        if self.general is not None:
            self.general.crop(length)
        check_crop(self, self.slots, length)
        if length == self.length:
            return
        if self.seen is None:
            self.filled = [length] * self.batch
        else:
            self.seen = self.seen[:, :length]
            self.filled = [int(row.sum()) for row in self.seen]
        for slot, tensor in zip(self.slots, self.past, strict=True):
            if not slot.grows:
                tensor.zero_()
        self.length = length

    def rows(self) -> list[Tensor]:
        """The caches as tensors of the length of the sequences, which have no hidden tokens."""
        pairs = zip(self.slots, self.past, strict=True)
        return [t[:, :, : self.length].clone() if slot.grows else t for slot, t in pairs]

    def _move(self, indices: Tensor) -> None:
        most = max(self.filled, default=0)
        for slot, tensor in zip(self.slots, self.past, strict=True):
            part = tensor[:, :, :most] if slot.grows else tensor
            part.copy_(part.index_select(0, indices))

    def _replace(self, order: Sequence[int]) -> None:
        """New buffers with the sequences `order` of the old ones."""
        most, picked = max(self.filled, default=0), torch.tensor(list(order), dtype=torch.int64)
        past: list[Tensor] = []
        for slot, old in zip(self.slots, self.past, strict=True):
            if not slot.grows:
                past.append(old.index_select(0, picked))
                continue
            new = _empty(slot, len(order), self.capacity)
            new[:, :, :most] = old[:, :, :most].index_select(0, picked)
            past.append(new)
        self.past = past
        self.present = [
            tensor if slot.grows else tensor.clone()
            for slot, tensor in zip(self.slots, past, strict=True)
        ]
        self.ready.clear()


def _shape(slot: Slot, batch: int, rows: int) -> list[int]:
    return [batch, *(rows if size == -1 else size for size in slot.shape)]


def _zeros(slot: Slot, batch: int, rows: int) -> Tensor:
    return torch.zeros(_shape(slot, batch, rows), dtype=getattr(torch, slot.dtype))


def _empty(slot: Slot, batch: int, rows: int) -> Tensor:
    return torch.empty(_shape(slot, batch, rows), dtype=getattr(torch, slot.dtype))
