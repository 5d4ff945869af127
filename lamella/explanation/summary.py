"""What an explanation shows, whatever it is drawn with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """What one part contributes.

    Attributes:
        name: Of the block or branch.
        kind: "attention", "mlp", …; empty for a block.
        flow: Relevance, with its sign.
        share: Of a branch in the stream it goes into, in [0, 1]; None for a block.
    """

    name: str
    kind: str
    flow: float
    share: float | None = None


@dataclass(frozen=True)
class HeadBars:
    """What the heads of one attention contribute.

    Attributes:
        name: The block or node that attends.
        flows: Relevance of each head.
    """

    name: str
    flows: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """Everything that is shown of an explanation but pixels.

    Attributes:
        title: What is explained, its value, and by which rules.
        rows: For each row of the batch its tokens with their relevance; empty without words.
        blocks: What each block adds.
        branches: What each branch adds.
        heads: Of every attention.
        notes: Where relevance went that no input got.
    """

    title: str
    rows: tuple[tuple[tuple[str, float], ...], ...]
    blocks: tuple[Bar, ...]
    branches: tuple[Bar, ...]
    heads: tuple[HeadBars, ...]
    notes: tuple[str, ...] = ()

    @property
    def largest_block(self) -> float:
        """The largest ``|flow|`` of a block; 1 where there is none."""
        return max((abs(bar.flow) for bar in self.blocks), default=0.0) or 1.0

    @property
    def largest_head(self) -> float:
        """The largest ``|flow|`` of a head; 1 where there is none."""
        return max((abs(flow) for bars in self.heads for flow in bars.flows), default=0.0) or 1.0


def strengths(row: tuple[tuple[str, float], ...]) -> list[tuple[str, float]]:
    """Each token with its relevance over the largest of the row, in [-1, 1]."""
    largest = max((abs(amount) for _, amount in row), default=0.0) or 1.0
    return [(word, amount / largest) for word, amount in row]


def printable(text: str) -> str:
    """`text` with a dot for what would move a cursor or show nothing."""
    return "".join(letter if letter.isprintable() else "·" for letter in text)
