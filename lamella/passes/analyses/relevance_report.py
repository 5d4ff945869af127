"""What a relevance analysis found; all amounts are means over the rows of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


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
        shared: How many heads next to each other share keys and values.
    """

    node: str
    block: str
    heads: tuple[Amounts, ...]
    shared: int = 1

    @property
    def groups(self) -> tuple[Amounts, ...]:
        """Flow and mass of the heads that share keys and values, together."""
        starts = range(0, len(self.heads), self.shared)
        each = [self.heads[start : start + self.shared] for start in starts]
        return tuple(Amounts(sum(h.flow for h in g), sum(h.mass for h in g)) for g in each)


@dataclass(frozen=True)
class PartsRelevance:
    """Relevance of the experts of a branch, or of the channels of a hidden layer.

    Attributes:
        name: Of the branch.
        node: Name of the node whose value they are parts of.
        flow: Of each, float64 ``[parts]``; of channels of experts ``[experts, channels]``.
        mass: As `flow`.
    """

    name: str
    node: str
    flow: Tensor = field(repr=False)
    mass: Tensor = field(repr=False)


@dataclass(frozen=True)
class WeightRelevance:
    """Relevance of a weight, ``<W, x^T M>``, by row.

    What its layer computes is this and its bias, entry by entry of the result.

    Attributes:
        weight: Name of the weight.
        rows: ``<W_i, (x^T M)_i>`` of each row, float64 ``[rows]``; of experts ``[experts, rows]``.
    """

    weight: str
    rows: Tensor = field(repr=False)

    @property
    def amounts(self) -> Amounts:
        """Flow of the weight; its mass is that of the rows, ``sum |row|``."""
        return Amounts(float(self.rows.sum()), float(self.rows.abs().sum()))


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
        experts: Of every mixture of experts.
        channels: Of every hidden layer.
        weights: Every weight of a layer or an embedding.
        tokens: Name of an input of integers -> relevance of the tokens of each row of the
            samples, in their order.
        pixels: Name of an input of images -> flow and mass of each pixel, means over the rows,
            float64 ``[2, height, width]``; channels of a pixel are added first.
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
    experts: tuple[PartsRelevance, ...] = field(default=(), repr=False)
    channels: tuple[PartsRelevance, ...] = field(default=(), repr=False)
    weights: tuple[WeightRelevance, ...] = field(default=(), repr=False)
    tokens: Mapping[str, Sequence[tuple[float, ...]]] = field(
        default_factory=dict[str, Sequence[tuple[float, ...]]], repr=False
    )
    pixels: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    ledger: Mapping[str, float] = field(default_factory=dict[str, float])
    closure: float = 0.0
