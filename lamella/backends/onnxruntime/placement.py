"""Which row of a cache each new token gets, where a mask hides some; and the calls for them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lamella.backends.decoder import Step
from lamella.backends.onnxruntime.buffers import Buffers


@dataclass(frozen=True)
class Placement:
    """New tokens without gaps: those that may be seen come first.

    Attributes:
        seen: Which new tokens may be seen, ``[batch, new]``; None means all.
        counts: How many that are, for each sequence.
        order: The new tokens in the order of their rows, ``[batch, new]``, hidden ones last; None
            means as they are.
        rows: The row of each token among the new ones, ``[batch, new]``; 0 for a hidden one.
    """

    seen: Tensor | None
    counts: list[int]
    order: Tensor | None
    rows: Tensor

    def arranged(self, values: Tensor) -> Tensor:
        """``[batch, new]`` in the order of the rows."""
        return values if self.order is None else values.gather(1, self.order)


@dataclass(frozen=True)
class Part:
    """What one call reads: some sequences, some new tokens.

    Attributes:
        sequences: Which sequences of the batch.
        tokens: ``[sequences, new]``.
        filled: Rows of each sequence before the call.
        rows: Which of `tokens` logits are wanted of, ``[sequences, wanted]``.
        positions: As `tokens`; None where the graph doesn't read them.
        mask: ``[sequences, past + new]``; None where the graph doesn't read it.
    """

    sequences: slice
    tokens: Tensor
    filled: list[int]
    rows: Tensor
    positions: Tensor | None
    mask: Tensor | None

    def until(self, stop: int) -> Part:
        """The first `stop` new tokens only; logits are wanted of none of the others."""
        return self if stop == self.tokens.shape[1] else self._cut(0, stop)

    def chunk(self, start: int, stop: int) -> tuple[Part, list[int]]:
        """Some of the new tokens of one sequence, and which of the wanted logits are theirs.

        A call without wanted logits gives some all the same.
        """
        part = self._cut(start, stop)
        rows = part.rows[0].tolist()
        inside = [place for place, row in enumerate(rows) if start <= row < stop]
        wanted = [rows[place] - start for place in inside] or [0]
        filled = [before + start for before in self.filled]
        return replace(part, rows=torch.tensor([wanted]), filled=filled), inside

    def _cut(self, start: int, stop: int) -> Part:
        mask, new = self.mask, self.tokens.shape[1]
        return replace(
            self,
            tokens=self.tokens[:, start:stop],
            positions=None if self.positions is None else self.positions[:, start:stop],
            mask=None if mask is None else mask[:, : mask.shape[1] - new + stop],
        )


def place(step: Step, batch: int, past: int, *, compact: bool) -> Placement:
    """Where the new tokens of `step` go; without `compact` hidden tokens get rows too."""
    new = step.tokens.shape[1]
    mask = None if step.mask is None or not compact else step.mask[:, past:]
    if mask is None or bool(mask.all()):
        rows = torch.arange(new).expand(batch, new)
        return Placement(None, [new] * batch, None, rows)
    seen = mask.ne(0)
    rows = (seen.long().cumsum(1) - 1).where(seen, torch.tensor(0))
    order = torch.sort(seen.logical_not().byte(), dim=1, stable=True).indices
    return Placement(seen, seen.sum(1).tolist(), order, rows)


def keeps_past(state: Buffers, mask: Tensor | None) -> bool:
    """Whether a mask hides of the past what was hidden when it was read, and nothing else."""
    if mask is None:
        return state.seen is None
    past = mask[:, : state.length]
    if state.seen is None:
        return bool(past.all())
    return torch.equal(past.ne(0), state.seen)


def is_left_padding(mask: Tensor) -> bool:
    """Whether a mask hides nothing but the first tokens of each sequence."""
    seen = mask.ne(0)
    return bool((seen[:, 1:] >= seen[:, :-1]).all())


def offsets(state: Buffers, placement: Placement, positions: Tensor) -> list[int] | None:
    """How far positions are from the rows, one number for each sequence; None when no number is.

    Attention whose angles come from the rows is the same as with these positions: it depends on
    differences of positions alone.
    """
    seen = None if placement.seen is None else placement.seen.tolist()
    rows, given, found = placement.rows.tolist(), positions.tolist(), list[int]()
    for index, filled in enumerate(state.filled):
        pairs = zip(given[index], rows[index], strict=True)
        apart = [position - row - filled for position, row in pairs]
        numbers = set(apart if seen is None else itertools.compress(apart, seen[index]))
        if state.offsets is not None and filled:
            numbers.add(state.offsets[index])
        if len(numbers) > 1:
            return None
        found.append(numbers.pop() if numbers else 0)
    return found
