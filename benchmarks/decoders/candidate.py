"""What a decoder must offer to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

Call = Callable[[], object]

STEPS = 20
"""Tokens of a call: who generates has weights in the cache from the token before, and a turn begins
with those of another candidate there, and with threads that sleep."""


@dataclass(frozen=True)
class Candidate:
    """A decoder.

    Attributes:
        name: For people.
        weight_bytes: Bytes of the weights that a step reads, as they are stored; embeddings are
            read row by row and don't count. None where nobody says.
        decode: Past -> a call that decodes `STEPS` tokens one by one behind so many.
        prefill: Tokens -> a call that reads a prompt of so many.
    """

    name: str
    weight_bytes: int | None
    decode: Callable[[int], Call]
    prefill: Callable[[int], Call]


@dataclass(frozen=True)
class Sizes:
    """What peers must know of the model.

    Attributes:
        vocabulary: Tokens.
        layers: Of the model.
        heads: Heads of keys and values.
        width: Of a head.
        embedding_bytes: Bytes of the table of embeddings in float32; 0 when the head reads it too.
        capacity: Positions.
    """

    vocabulary: int
    layers: int
    heads: int
    width: int
    embedding_bytes: int
    capacity: int

    @classmethod
    def of(cls, model: LlamaForCausalLM) -> Sizes:
        """The sizes of `model`."""
        config = model.config
        table = config.vocab_size * config.hidden_size * 4
        return cls(
            vocabulary=config.vocab_size,
            layers=config.num_hidden_layers,
            heads=config.num_key_value_heads,
            width=config.head_dim,
            embedding_bytes=0 if config.tie_word_embeddings else table,
            capacity=config.max_position_embeddings,
        )

    def cache(self, tokens: int) -> Tensor:
        """Random keys or values from -1 to 1, ``[1, heads, tokens, width]``.

        Zeros would not do: memory that nobody has written to is one page, always in the cache.
        """
        return torch.rand(1, self.heads, tokens, self.width) * 2 - 1


def llama() -> LlamaForCausalLM:
    """88 million random weights: 12 blocks, 768 wide, 12 heads over 4 for keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def token() -> Tensor:
    """One new token."""
    return torch.ones(1, 1, dtype=torch.int64)


def prompt(tokens: int) -> Tensor:
    """So many tokens."""
    return torch.ones(1, tokens, dtype=torch.int64)
