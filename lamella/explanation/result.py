"""What an explanation tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Group
from torch import Tensor

from lamella.errors import SamplesError
from lamella.explanation import rendering
from lamella.passes.analyses.relevance_report import (
    BlockRelevance,
    HeadsRelevance,
    SublayerRelevance,
)


@dataclass(frozen=True)
class Ledger:
    """Where relevance went that no input got.

    Attributes:
        kept: Cause -> amount: biases, softmax, stabilizers, constants, ….
        closure: ``(start - inputs - kept) / |start|``: rounding only.
    """

    kept: Mapping[str, float]
    closure: float


@dataclass(frozen=True)
class Explanation:
    """The relevance of everything for one output.

    Relevance is a signed share: what all inputs got and what the ledger names sum up to the
    output that is explained.

    Attributes:
        preset: Name of the rules.
        target: What is explained, in words.
        start: What there was to distribute, the sum over the rows of the batch.
        inputs: Name of an input -> its relevance: of the shape of the input, or
            ``[batch, tokens, width]``, per entry of the embedding, where the input is integers.
        blocks: Relevance of the stream behind each block, over the batch.
        sublayers: What each branch of the stream contributes, over the batch.
        heads: What each head of each attention contributes, over the batch.
        words: The tokens of each row, as the tokenizer writes them; empty without a tokenizer.
        ledger: None unless asked for.
    """

    preset: str
    target: str
    start: float
    inputs: Mapping[str, Tensor] = field(repr=False)
    blocks: tuple[BlockRelevance, ...] = field(repr=False)
    sublayers: tuple[SublayerRelevance, ...] = field(repr=False)
    heads: tuple[HeadsRelevance, ...] = field(repr=False)
    words: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    ledger: Ledger | None = None

    @property
    def tokens(self) -> Tensor:
        """Relevance of each token, ``[batch, tokens]``: its embedding summed over the width.

        Raises:
            SamplesError: The model takes no tokens.
        """
        of_tokens = self.inputs.get("input_ids")
        if of_tokens is None:
            of_tokens = next((x for x in self.inputs.values() if x.ndim == 3), None)
        if of_tokens is None or of_tokens.ndim != 3:
            raise SamplesError(
                f"no input is a sequence of tokens; the inputs are {', '.join(self.inputs)}"
            )
        return of_tokens.sum(-1)

    @property
    def pixels(self) -> Tensor:
        """Relevance of each pixel, ``[batch, height, width]``: summed over the channels.

        Raises:
            SamplesError: The model takes no images.
        """
        image = next((x for x in self.inputs.values() if x.ndim == 4), None)
        if image is None:
            raise SamplesError(
                f"no input is an image [batch, channels, height, width]; the inputs are "
                f"{', '.join(f'{name} {list(x.shape)}' for name, x in self.inputs.items())}"
            )
        return image.sum(1)

    def __str__(self) -> str:
        return rendering.plain(self)

    def terminal(self) -> Group:
        """Tokens in colors and a table, for a rich console."""
        return rendering.terminal(self)

    def html(self) -> str:
        """One page without scripts and without references to anything outside of it."""
        return rendering.page(self)
