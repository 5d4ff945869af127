"""The cache of a compiled model, in the place of the caches of transformers."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor
from transformers.cache_utils import Cache

from lamella.backends.decoder import State
from lamella.errors import GenerationError


@final
class StateCache(Cache):
    """What `generate` hands from call to call: the state of a decoder.

    The tensors stay with the backend; transformers sees the length, and may reorder, repeat or
    shorten the sequences.

    Attributes:
        capacity: Tokens to make room for when the state is started.
        state: The state, once there is one.
    """

    def __init__(self, capacity: int = 0) -> None:
        """A cache that no token has met yet."""
        super().__init__(layers=[])
        self.capacity = capacity
        self.state: State | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each sequence so far."""
        return 0 if self.state is None else self.state.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: the cache grows."""
        return -1

    @property
    def is_initialized(self) -> bool:
        """Whether a token has been read."""
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        """False: there is nothing for `torch.compile`."""
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with the sequences `beam_idx`, as beam search asks."""
        if self.state is not None:
            self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with some of the sequences."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with each sequence several times."""
        if self.state is not None:
            self.state.repeat(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is how many stay.

        Both are in use: transformers counted what stays until 5.0, and counts what goes since.
        """
        if self.state is not None:
            length = self.state.length
            kept = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
            self.state.crop(min(kept, length))

    def reset(self) -> None:
        """Forget everything."""
        self.state = None

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Refused: keys and values are written by the compiled model."""
        raise GenerationError("the cache of a compiled model is filled by the model alone")
