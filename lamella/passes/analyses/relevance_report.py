"""What a relevance analysis found; all amounts are means over the rows of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Amounts:
    """Relevance of one value.

    Attributes:
        flow: ``sum a M``: what the value contributes to the output, with its sign. Through a
            full cut of the graph it is the same everywhere, so that it ranks no layers.
        mass: ``sum |a M|``.
    """

    flow: float
    mass: float

    @property
    def positive(self) -> float:
        """``sum max(a M, 0)``."""
        return (self.mass + self.flow) / 2


@dataclass(frozen=True)
class OperationRelevance:
    """Relevance of the result of an operation.

    Attributes:
        node: Name of the node.
        operator: ``aten.linear.default``.
        block: Name of the block it is in, or "" outside of blocks.
        amounts: Flow and mass.
    """

    node: str
    operator: str
    block: str
    amounts: Amounts


@dataclass(frozen=True)
class BlockRelevance:
    """Relevance of the stream behind a block.

    Attributes:
        index: Place among the blocks.
        name: As in the stream.
        amounts: Of the exit; None if no relevance of the inputs goes through it.
        added: What its branches contribute together, with its sign.
    """

    index: int
    name: str
    amounts: Amounts | None
    added: float = 0.0


@dataclass(frozen=True)
class SublayerRelevance:
    """Relevance of a branch of the stream, by the coefficient `M` of the sum it goes into.

    Attributes:
        index: Place among the sublayers.
        name: As in the stream.
        kind: "attention", "mlp", ….
        amounts: Flow and mass of the branch.
        effect: ``E |<branch, M>|`` over rows: how much the output would change, in first order,
            without the branch.
        share: ``effect / (effect + E |<shortcut, M>|)``, in [0, 1].
    """

    index: int
    name: str
    kind: str
    amounts: Amounts
    effect: float
    share: float


@dataclass(frozen=True)
class HeadsRelevance:
    """Relevance of the heads of one attention.

    Attributes:
        node: Name of the node that attends.
        block: Name of the block it is in, or "".
        heads: Flow and mass of the result of each head.
    """

    node: str
    block: str
    heads: tuple[Amounts, ...]


@dataclass(frozen=True)
class RelevanceReport:
    """What every part of a model contributes to its output.

    Attributes:
        preset: Name of the rules.
        rows: How many rows the samples had.
        start: ``<seed, output>``, what there was to distribute.
        inputs: Name of each attributed input -> flow and mass.
        operations: Every operation that relevance passes, in order.
        blocks: In order.
        sublayers: In order; those that no relevance goes through are left out.
        heads: Of every attention whose heads are an axis.
        ledger: Cause -> what was kept there; empty unless asked for.
        closure: ``(start - inputs - ledger) / |start|``, rounding only; 0 without a ledger.
    """

    preset: str
    rows: int
    start: float
    inputs: Mapping[str, Amounts]
    operations: tuple[OperationRelevance, ...] = field(repr=False)
    blocks: tuple[BlockRelevance, ...] = field(repr=False)
    sublayers: tuple[SublayerRelevance, ...] = field(repr=False)
    heads: tuple[HeadsRelevance, ...] = field(repr=False)
    ledger: Mapping[str, float] = field(default_factory=dict[str, float])
    closure: float = 0.0
