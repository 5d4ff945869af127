"""What an explanation tells."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from torch import Tensor

from lamella.errors import SamplesError
from lamella.explanation import files, plots, rendering
from lamella.explanation.summary import Bar, HeadBars, Summary, printable
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
        given: The inputs that were explained, by name.
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
    given: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
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
        return self.inputs[self._image()].sum(1)

    def __str__(self) -> str:
        return rendering.plain(self._summary())

    def terminal(self) -> Group:
        """Tokens in colors and tables with bars, for a rich console."""
        return rendering.terminal(self._summary())

    def html(self, *, over: bool = False) -> str:
        """One page without scripts and without references to anything outside of it.

        Pixel maps are in it where matplotlib is installed (``pip install 'lamella[plots]'``).

        Args:
            over: As in `png`.
        """
        has_map = self._has_image() and plots.is_installed()
        return rendering.page(self._summary(), self.png(over=over) if has_map else None)

    def png(self, *, over: bool = False) -> bytes:
        """Relevance of the pixels of each image: red speaks for the target, blue against it.

        Colors are symmetric around zero; the strongest stands for the largest relevance in the
        image, whatever its sign.

        Args:
            over: Draw the maps over the images.

        Raises:
            SamplesError: The model takes no images, or there are more than 64.
            BackendError: Matplotlib is not installed (``pip install 'lamella[plots]'``).
        """
        pixels, name = self.pixels, self._image()
        return plots.pixel_maps(pixels, self.given[name] if over else None, self._title())

    def chart(self) -> bytes:
        """What blocks, branches and heads contribute, as a PNG with bars.

        Raises:
            SamplesError: The model has none.
            BackendError: Matplotlib is not installed (``pip install 'lamella[plots]'``).
        """
        return plots.bars(self._summary())

    def save(self, path: str | os.PathLike[str], *, over: bool = False) -> None:
        """Write a file of the kind that its ending says.

        ``.html`` is `html`, ``.json`` all numbers but those of single pixels and of embeddings,
        and ``.png`` the pixel map of a model of images and else the chart.

        Args:
            path: Of the file; an old one is replaced.
            over: As in `png`.

        Raises:
            ValueError: The ending is another.
            FileNotFoundError: There is no such folder.
            SamplesError: `over` is asked for, and the model takes no images.
            BackendError: Matplotlib is not installed, which ``.png`` needs.
        """
        if over:
            self._image()
        files.write(
            path,
            {
                ".html": lambda: self.html(over=over).encode(),
                ".json": lambda: files.as_json(self.data()),
                ".png": lambda: self.png(over=over) if self._has_image() else self.chart(),
            },
        )

    def data(self) -> dict[str, Any]:
        """Names and numbers for other programs; relevance of tokens is that of each row."""
        summary = self._summary()
        ledger = self.ledger
        return {
            "preset": self.preset,
            "target": self.target,
            "start": self.start,
            "inputs": {name: float(x.double().sum()) for name, x in self.inputs.items()},
            "tokens": [
                [{"token": word, "relevance": amount} for word, amount in row]
                for row in summary.rows
            ],
            "blocks": [{"name": bar.name, "flow": bar.flow} for bar in summary.blocks],
            "sublayers": [
                {"name": bar.name, "kind": bar.kind, "share": bar.share, "flow": bar.flow}
                for bar in summary.branches
            ],
            "heads": [{"name": bars.name, "flows": bars.flows} for bars in summary.heads],
            "ledger": None if ledger is None else dict(ledger.kept),
            "closure": None if ledger is None else ledger.closure,
        }

    def _has_image(self) -> bool:
        return any(relevance.ndim == 4 for relevance in self.inputs.values())

    def _image(self) -> str:
        """Name of the input that is an image."""
        for name, relevance in self.inputs.items():
            if relevance.ndim == 4:
                return name
        integers = [
            name
            for name in self.inputs
            if isinstance(value := self.given.get(name), Tensor) and not value.is_floating_point()
        ]
        if integers:
            raise SamplesError(
                f"pixels have no relevance here: {', '.join(integers)} holds integers, whose "
                f"relevance is that of tokens"
            )
        raise SamplesError(
            f"no input is an image [batch, channels, height, width]; the inputs are "
            f"{', '.join(f'{name} {list(x.shape)}' for name, x in self.inputs.items())}"
        )

    def _title(self) -> str:
        return printable(f"{self.target}: {self.start:.4g}, by the rules {self.preset}")

    def _summary(self) -> Summary:
        rows = [
            tuple(zip(map(printable, words), self.tokens[row].tolist(), strict=True))
            for row, words in enumerate(self.words)
        ]
        return Summary(
            self._title(),
            tuple(rows),
            tuple(Bar(block.name, "", block.added) for block in self.blocks),
            tuple(Bar(s.name, s.kind, s.amounts.flow, s.share) for s in self.sublayers),
            tuple(
                HeadBars(each.block or each.node, tuple(head.flow for head in each.heads))
                for each in self.heads
            ),
            self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        if self.ledger is None:
            return ()
        kept = [f"{cause} {amount:+.3g}" for cause, amount in self.ledger.kept.items() if amount]
        closure = f"the sum closes to {self.ledger.closure:.1e}"
        return (f"kept by {', '.join(kept)}; {closure}" if kept else closure,)
