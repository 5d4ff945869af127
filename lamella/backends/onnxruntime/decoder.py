"""Decoding with the caches bound once.

The keys and values of a layer lie in one buffer that is both past and present of a call: a new
token is written behind the rows that are there, and nothing is copied. Tokens that a mask hides
get no row, so that a batch padded on the left needs no mask either. What the buffers can't do (a
mask that changes its mind about the past, positions that jump) is handed to a decoder over
tensors that grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from lamella.backends.decoder import Decoder, GrowingState, State, Step
from lamella.backends.onnxruntime.binding import Binding
from lamella.backends.onnxruntime.buffers import Buffers
from lamella.backends.onnxruntime.counts import CHUNK, FILLED, ROWS, TOTAL
from lamella.backends.onnxruntime.placement import (
    Part,
    Placement,
    is_left_padding,
    keeps_past,
    offsets,
    place,
)
from lamella.backends.onnxruntime.session import Bound, Session
from lamella.errors import GenerationError
from lamella.ir.cache import CacheLayout


@final
class OnnxDecoder(Decoder):
    """A decoder over a session whose caches are buffers.

    Args:
        layout: The layout of the graph.
        session: Of the graph as `Caches.BOUND`.
        binding: What the buffers can do.
        general: Makes the decoder for what they can't; called when it is needed.
    """

    def __init__(
        self,
        layout: CacheLayout,
        session: Session,
        binding: Binding,
        general: Callable[[], Decoder],
    ) -> None:
        """Nothing is bound before a state is started."""
        super().__init__(layout)
        self._session, self._binding = session, binding
        self._make_general, self._general = general, None
        self._reads = frozenset(session.inputs)
        self._vocabulary = session.last_size(layout.logits)

    @property
    def tables(self) -> int | None:
        """Positions that the tables of angles hold; None when the graph computes angles."""
        return self._binding.limit

    def _new_state(self, batch: int, capacity: int, once: Mapping[str, Tensor]) -> State:
        once = {name: value.contiguous() for name, value in once.items()}
        state = Buffers(self.layout, batch, once)
        state.make_room(self._within(capacity), self._binding.limit)
        return state

    def _advance(self, state: State, step: Step) -> Tensor:
        assert isinstance(state, Buffers)
        if state.general is None:
            placement = self._placement(state, step)
            if placement is not None:
                return self._run(state, step, placement)
            self._hand_over(state)
        assert self._general is not None
        assert state.general is not None
        return self._general.step(
            state.general, step.tokens, step.mask, step.positions, last_only=step.last_only
        )

    def _continue(self, state: State, tokens: Tensor) -> Tensor | None:
        """One more token of each sequence: numbers are written into the call that is bound."""
        assert isinstance(state, Buffers)
        call = state.ready.get(state.side) if tokens.shape[1] == 1 else None
        if call is None or not state.is_plain or state.length >= state.capacity:
            return None
        if self.layout.mask in self._reads:
            return None  # it gets longer with every token
        call.write(self.layout.tokens, tokens)
        for name, value in ((FILLED, state.length), (TOTAL, state.length + 1)):
            if name in self._reads:
                call.write(name, value)
        if self.layout.positions in self._reads:
            call.write(self.layout.positions, state.length)
        call.run()
        state.turn()
        state.filled = [state.length + 1] * state.batch
        return call.tensor(self.layout.logits)

    # ---- what the buffers can do --------------------------------------------------------

    def _placement(self, state: Buffers, step: Step) -> Placement | None:
        """Where the new tokens go; None when the buffers can't hold them as they are meant."""
        limit, new = self._binding.limit, step.tokens.shape[1]
        if limit is not None and max(state.filled) + new > limit:
            return None
        compact = self._binding.padding == "compact"
        placement = place(step, state.batch, state.length, compact=compact)
        if not self._mask_fits(state, step, placement):
            return None
        if step.positions is not None and self.layout.positions not in self._reads:
            found = offsets(state, placement, step.positions)
            if found is None:
                return None
            state.offsets = found
        return placement

    def _mask_fits(self, state: Buffers, step: Step, placement: Placement) -> bool:
        if self._binding.padding == "given":
            return True
        if self._binding.padding == "general":
            return step.mask is None or bool(step.mask.all())
        if not keeps_past(state, step.mask):
            return False
        hides = placement.seen is not None or state.seen is not None
        if hides and self._binding.windowed and step.mask is not None:
            return is_left_padding(step.mask)
        return True

    def _hand_over(self, state: Buffers) -> None:
        """Let the general decoder go on from here."""
        if state.seen is not None:
            raise GenerationError(
                "the mask hides other tokens of the past than when they were read, or positions "
                "jump in a padded batch; start again from the first token"
            )
        if self._general is None:
            self._general = self._make_general()
        general = self._general.start(state.batch, once=state.once)
        assert isinstance(general, GrowingState)
        general.cache, general.length = state.rows(), state.length
        state.general = general

    def _within(self, rows: int) -> int:
        limit = self._binding.limit
        return rows if limit is None else min(rows, limit)

    # ---- running ------------------------------------------------------------------------

    def _run(self, state: Buffers, step: Step, placement: Placement) -> Tensor:
        new = step.tokens.shape[1]
        state.make_room(max(state.filled) + new, self._binding.limit)
        run = self._one_token if new == 1 else self._several
        logits = run(state, step, placement)
        state.add(placement.seen, placement.counts, new)
        return logits

    def _one_token(self, state: Buffers, step: Step, placement: Placement) -> Tensor:
        """The call for one new token of each sequence, which stays bound from token to token."""
        part = self._part(state, step, slice(0, state.batch), placement.rows)
        call = state.ready.get(state.side)
        if call is None:
            call = state.ready[state.side] = self._bound(state, part)
        else:
            self._write(call, part)
        call.run()
        state.turn()
        return call.tensor(self.layout.logits)

    def _several(self, state: Buffers, step: Step, placement: Placement) -> Tensor:
        """A prompt, or several tokens behind others."""
        new, positions = step.tokens.shape[1], step.positions
        step = replace(
            step,
            tokens=placement.arranged(step.tokens),
            positions=None if positions is None else placement.arranged(positions),
        )
        wanted = placement.rows[:, -1:] if step.last_only else placement.rows
        if state.batch > 1 and not any(state.filled) and new <= CHUNK:
            # Rows of hidden tokens lie behind the others; what comes next overwrites them.
            return self._call(state, self._part(state, step, slice(0, state.batch), wanted))
        parts: list[Tensor] = []
        for index, count in enumerate(placement.counts):
            one = slice(index, index + 1)
            part = self._part(state, step, one, wanted[one])
            parts.append(self._chunks(state, part.until(max(count, 1))))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chunks(self, state: Buffers, part: Part) -> Tensor:
        """The new tokens of one sequence, some at a time."""
        new = part.tokens.shape[1]
        if new <= CHUNK:
            return self._call(state, part)
        logits = torch.empty(1, part.rows.shape[1], self._vocabulary)
        for start in range(0, new, CHUNK):
            chunk, inside = part.chunk(start, min(start + CHUNK, new))
            found = self._call(state, chunk)
            logits[:, inside] = found[:, : len(inside)]
        return logits

    def _call(self, state: Buffers, part: Part) -> Tensor:
        call = self._bound(state, part)
        call.run()
        if len(part.filled) == state.batch:
            state.turn()
        else:
            state.keep(part.sequences)
        return call.tensor(self.layout.logits)

    def _part(self, state: Buffers, step: Step, sequences: slice, rows: Tensor) -> Part:
        total = state.length + step.tokens.shape[1]
        mask = None
        if self.layout.mask in self._reads:
            mask = torch.ones(state.batch, total) if step.mask is None else step.mask
            mask = mask[sequences].to(torch.int64)
        positions = step.positions if self.layout.positions in self._reads else None
        return Part(
            sequences,
            step.tokens[sequences],
            state.filled[sequences],
            rows,
            None if positions is None else positions[sequences],
            mask,
        )

    def _bound(self, state: Buffers, part: Part) -> Bound:
        """A call on the buffers of some sequences."""
        call, chosen, layout = self._session.bind(), part.sequences, self.layout
        for name, value in state.once.items():
            call.input(name, value[chosen])
        for name, value in self._numbers(part).items():
            call.input(name, value.contiguous().clone())
        for slot, past, present in zip(layout.slots, state.past, state.present, strict=True):
            if past is present:
                call.buffer(slot.input, slot.output, past[chosen])
            else:
                call.input(slot.input, past[chosen])
                call.output(slot.output, present[chosen])
        wanted = (len(part.filled), part.rows.shape[1], self._vocabulary)
        call.output(layout.logits, torch.empty(wanted))
        return call

    def _write(self, call: Bound, part: Part) -> None:
        """The numbers of another token into a call that is bound."""
        for name, value in self._numbers(part).items():
            if name == ROWS:
                continue
            if call.tensor(name).shape == value.shape:
                call.write(name, value)
            else:
                call.input(name, value.contiguous().clone())

    def _numbers(self, part: Part) -> dict[str, Tensor]:
        """The inputs that change from call to call."""
        new = part.tokens.shape[1]
        numbers: dict[str, Tensor | None] = {
            self.layout.tokens: part.tokens.to(torch.int64),
            FILLED: torch.tensor([rows + new - 1 for rows in part.filled], dtype=torch.int32),
            TOTAL: torch.tensor(max(part.filled) + new, dtype=torch.int32),
            ROWS: part.rows.unsqueeze(-1),
            self.layout.mask: part.mask,
        }
        if self.layout.positions is not None:
            numbers[self.layout.positions] = part.positions
        return {n: v for n, v in numbers.items() if v is not None and n in self._reads}
