"""What generates: a model that goes on from where its last call ended.

A `Decoder` is called with new tokens and a `State`, and gives the logits of the new tokens. The
state holds what the model keeps between calls; it belongs to the decoder that started it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lamella.backends.inputs import InputSpec
from lamella.errors import BackendError, GenerationError
from lamella.ir.cache import CacheLayout, Slot


class State(abc.ABC):
    """What a decoder knows of the sequences it continues.

    Attributes:
        batch: How many sequences.
        length: Tokens of each sequence so far, those that the mask hid included.
    """

    def __init__(self, batch: int) -> None:
        """Sequences without tokens."""
        self.batch = batch
        self.length = 0

    @abc.abstractmethod
    def reorder(self, indices: Tensor) -> None:
        """Go on with the sequences `indices` (a vector), in this order, some several times."""

    @abc.abstractmethod
    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens of each sequence.

        Raises:
            GenerationError: There are fewer tokens, or the model keeps a state that can't be
                taken back (a recurrence).
        """

    @final
    def repeat(self, times: int) -> None:
        """Go on with each sequence `times` times, copies side by side.

        Raises:
            ValueError: `times` is less than 1.
        """
        if times < 1:
            raise ValueError(f"times must be at least 1, got {times}")
        self.reorder(torch.arange(self.batch).repeat_interleave(times))


@dataclass(frozen=True)
class Step:
    """New tokens, and all that is known of where they stand.

    Attributes:
        tokens: ``[batch, new]``.
        mask: Nonzero where a token may be seen, ``[batch, past + new]``; None hides none.
        positions: ``[batch, new]``; None where the model has no use for them.
        last_only: The logits of all but the last token are not wanted.
    """

    tokens: Tensor
    mask: Tensor | None
    positions: Tensor | None
    last_only: bool


class Decoder(abc.ABC):
    """A model with a cache.

    Attributes:
        layout: What the model keeps between calls.
    """

    def __init__(self, layout: CacheLayout) -> None:
        """Subclasses call this first."""
        self.layout = layout

    @final
    def start(
        self, batch: int, capacity: int = 0, once: Mapping[str, Tensor] | None = None
    ) -> State:
        """A state without tokens.

        Args:
            batch: How many sequences.
            capacity: Tokens to make room for at once; a sequence that gets longer costs a copy.
            once: The inputs `CacheLayout.once`, by name.

        Raises:
            GenerationError: An input of `once` is missing or unknown, or `capacity` is more
                than the model has positions for.
        """
        if batch < 1:
            raise GenerationError(f"a batch needs at least one sequence, got {batch}")
        once = {} if once is None else once
        if set(once) != set(self.layout.once):
            wanted = ", ".join(self.layout.once) or "none"
            raise GenerationError(
                f"the decoder takes the inputs {wanted} once for a sequence, got "
                f"{', '.join(once) or 'none'}"
            )
        self._check_room(capacity)
        return self._new_state(batch, capacity, once)

    @final
    def step(
        self,
        state: State,
        tokens: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Read new tokens.

        Args:
            state: Goes on to hold the new tokens too.
            tokens: As many for each sequence, at least one.
            mask: Nonzero where a token may be seen, ``[batch, past + new]``; None hides none.
            positions: Positions of the new tokens; None counts them as the model does.
            last_only: Give the logits of the last token only, which saves the head for a whole
                prompt.

        Returns:
            Logits ``[batch, new, vocabulary]``, or ``[batch, 1, vocabulary]`` with `last_only`.
            They stay valid until the next call.

        Raises:
            GenerationError: Sizes don't agree, or the model has no positions left.
        """
        self._check(state, tokens, mask)
        _check_positions(tokens, positions)
        logits = None
        if _is_next_token(state, tokens, mask, positions):
            logits = self._continue(state, tokens)
        if logits is None:
            if positions is None or self.layout.positions is None:
                positions = self._positions(state, tokens, mask)
            logits = self._advance(state, Step(tokens, mask, positions, last_only))
        state.length += tokens.shape[1]
        return logits

    @abc.abstractmethod
    def _new_state(self, batch: int, capacity: int, once: Mapping[str, Tensor]) -> State:
        """What `start` gives, of arguments that were checked."""

    @abc.abstractmethod
    def _advance(self, state: State, step: Step) -> Tensor:
        """What `step` gives; all but ``state.length`` is left as it is after the new tokens."""

    def _continue(self, state: State, tokens: Tensor) -> Tensor | None:
        """What `step` gives for one more token of sequences of which nothing is hidden.

        None when the decoder has no shorter way for it.
        """
        del state, tokens
        return None

    def _check(self, state: State, tokens: Tensor, mask: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.shape[0] != state.batch or tokens.shape[1] < 1:
            raise GenerationError(
                f"new tokens have shape {list(tokens.shape)}, expected [{state.batch}, at least 1]"
            )
        total = state.length + tokens.shape[1]
        if mask is not None and mask.shape != (state.batch, total):
            raise GenerationError(
                f"the mask has shape {list(mask.shape)}, expected [{state.batch}, {total}]: "
                f"{state.length} tokens of the past and {tokens.shape[1]} new ones"
            )
        self._check_room(total)

    def _check_room(self, length: int) -> None:
        limit = self.layout.positions_limit
        if limit is not None and length > limit:
            raise GenerationError(
                f"a sequence of {length} tokens is longer than the model has positions for "
                f"({limit}); shorten the prompt or generate fewer tokens"
            )

    def _positions(self, state: State, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        if self.layout.positions is None:
            return None
        total = state.length + tokens.shape[1]
        if mask is None or self.layout.positions_from == "index":
            return torch.arange(state.length, total).expand(state.batch, -1)
        seen = mask.ne(0).long()
        return (seen.cumsum(-1) * seen - 1)[:, state.length :]


@final
class GrowingState(State):
    """A cache of tensors, each call's results the next call's arguments.

    Attributes:
        cache: The tensor of each slot, in the order of the layout.
        once: The inputs that stay, by name.
    """

    def __init__(self, layout: CacheLayout, batch: int, once: Mapping[str, Tensor]) -> None:
        """An empty cache."""
        super().__init__(batch)
        self.once = dict(once)
        self.cache = [empty_slot(slot, batch) for slot in layout.slots]
        self._slots = layout.slots

    def reorder(self, indices: Tensor) -> None:
        """Pick the sequences in every tensor."""
        self.cache = [tensor.index_select(0, indices) for tensor in self.cache]
        self.once = {name: value.index_select(0, indices) for name, value in self.once.items()}
        self.batch = len(indices)

    def crop(self, length: int) -> None:
        """Cut the tensors that grow; the others can only start again."""
        check_crop(self, self._slots, length)
        if length < self.length:
            pairs = zip(self._slots, self.cache, strict=True)
            self.cache = [
                tensor[:, :, :length] if slot.grows else empty_slot(slot, self.batch)
                for slot, tensor in pairs
            ]
        self.length = length


@final
class GrowingDecoder(Decoder):
    """A decoder over any executable of a graph with a cache.

    Args:
        run: Flat outputs of flat inputs, as `Executable.run`.
        layout: The layout of the graph.
        inputs: Its inputs, as `Executable.inputs`.
        outputs: Names of its outputs.

    Raises:
        BackendError: The graph has an input that generation has nothing to give for.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        layout: CacheLayout,
        inputs: Sequence[InputSpec],
        outputs: Sequence[str],
    ) -> None:
        """Find the places of what the layout names."""
        super().__init__(layout)
        self._run, self._inputs = run, tuple(inputs)
        check_covered(layout, [spec.name for spec in inputs])
        self._logits = list(outputs).index(layout.logits)
        self._presents = [list(outputs).index(slot.output) for slot in layout.slots]

    def _new_state(self, batch: int, capacity: int, once: Mapping[str, Tensor]) -> State:
        return GrowingState(self.layout, batch, once)

    def _advance(self, state: State, step: Step) -> Tensor:
        assert isinstance(state, GrowingState)
        layout, total = self.layout, state.length + step.tokens.shape[1]
        mask = torch.ones(state.batch, total, dtype=torch.int64) if step.mask is None else step.mask
        given: dict[str, Any] = {layout.tokens: step.tokens, layout.mask: mask, **state.once}
        if layout.positions is not None:
            given[layout.positions] = step.positions
        given |= {s.input: t for s, t in zip(layout.slots, state.cache, strict=True)}
        values = [_fitting(spec, given[spec.name]) for spec in self._inputs]
        results = self._run(values)
        state.cache = [results[place] for place in self._presents]
        logits = results[self._logits]
        return logits[:, -1:] if step.last_only else logits


def _check_positions(tokens: Tensor, positions: Tensor | None) -> None:
    if positions is not None and positions.shape != tokens.shape:
        raise GenerationError(
            f"positions have shape {list(positions.shape)} where the new tokens have "
            f"{list(tokens.shape)}"
        )


def _is_next_token(
    state: State, tokens: Tensor, mask: Tensor | None, positions: Tensor | None
) -> bool:
    """Whether this is one more token at its place, and the mask hides nothing."""
    if tokens.shape[1] != 1 or not (mask is None or bool(mask.all())):
        return False
    return positions is None or bool((positions == state.length).all())


def empty_slot(slot: Slot, batch: int) -> Tensor:
    """What a slot holds before the first token."""
    shape = [0 if size == -1 else size for size in slot.shape]
    return torch.zeros(batch, *shape, dtype=getattr(torch, slot.dtype))


def check_crop(state: State, slots: Sequence[Slot], length: int) -> None:
    """Refuse to forget what can't be forgotten.

    Raises:
        GenerationError: See `State.crop`.
    """
    if not 0 <= length <= state.length:
        raise GenerationError(f"can't keep {length} tokens of a sequence that has {state.length}")
    kept = next((slot for slot in slots if not slot.grows), None)
    if kept is not None and 0 < length < state.length:
        raise GenerationError(
            f"can't go back from {state.length} tokens to {length}: {kept.input} holds a state "
            f"that every token changed; start again from the first token"
        )


def check_covered(layout: CacheLayout, inputs: Sequence[str]) -> None:
    """Refuse a graph whose inputs a decoder can't fill.

    Raises:
        BackendError: It lists them.
    """
    known = {layout.tokens, layout.mask, layout.positions, *layout.once}
    known |= {slot.input for slot in layout.slots}
    unknown = [name for name in inputs if name not in known]
    if unknown:
        raise BackendError(
            f"the graph takes {', '.join(unknown)}, which generation has nothing to give for; "
            f"capture the model without"
        )


def _fitting(spec: InputSpec, value: Tensor) -> Any:
    """`value` in the dtype the graph was captured with; None where it takes no tensor."""
    return value.to(getattr(torch, spec.dtype)) if spec.dtype else None
