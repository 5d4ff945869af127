"""What a graph keeps between calls: the layout of its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["key", "value", "convolution", "scan"]
Positions = Literal["index", "mask"]


@dataclass(frozen=True)
class Slot:
    """One tensor of the cache, an input of the graph and an output in the same place.

    Attributes:
        layer: Number of the layer, from 0 in the order of the graph, without gaps.
        kind: What it holds. ``"key"`` and ``"value"`` grow with every token along axis 2 and are
            empty at first, ``[batch, kv_heads, past, width]``; ``"convolution"`` (the last
            inputs, ``[batch, channels, kernel - 1]``) and ``"scan"`` (``[batch, channels,
            states]``, with heads ``[batch, heads, width, states]``) keep their size and are zero
            at first.
        input: Name of the input that takes the past.
        output: Name of the output that gives past and new.
        shape: Sizes of all axes but the batch; the axis that grows is -1.
        dtype: Name of the dtype in torch, ``"float32"``.
    """

    layer: int
    kind: Kind
    input: str
    output: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def grows(self) -> bool:
        """Whether it gets longer with every token."""
        return self.kind in ("key", "value")


@dataclass(frozen=True)
class Source:
    """Where an output of a model comes from when it is made of two graphs.

    Attributes:
        graph: ``"step"``, ``"once"``, or ``"constant"`` for what is no tensor of either.
        index: Its place among the outputs of that graph.
        value: The constant.
    """

    graph: Literal["step", "once", "constant"]
    index: int = 0
    value: Any = None


@dataclass(frozen=True)
class CacheLayout:
    """How a graph that continues from a cache is called.

    Its inputs are those of the model it was made from, with `tokens` the new tokens only, then
    `mask` and `positions` where the model had none, then the slots.

    Attributes:
        tokens: Input of the new tokens, integers ``[batch, new]``.
        mask: Input that is nonzero for the tokens that may be seen, ``[batch, past + new]``,
            int64; its length is how the graph knows the past.
        positions: Input of the positions of the new tokens, int64 ``[batch, new]``; None when the
            model has no use for it.
        positions_from: What positions are when the caller gives none: the ``"index"`` of the
            token in the sequence, or its place among the tokens of the ``"mask"`` (-1 for a token
            that it hides).
        logits: Output that holds the logits, ``[batch, new, vocabulary]``.
        once: Inputs that another graph computes once for a sequence (see `Incremental.once`): the
            keys and values of a decoder over the states of its encoder, for example.
        slots: The tensors that go from call to call.
        positions_limit: How many positions the tables of the model hold; None without a table.
    """

    tokens: str
    mask: str
    positions: str | None
    positions_from: Positions
    logits: str
    once: tuple[str, ...]
    slots: tuple[Slot, ...]
    positions_limit: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As data for a manifest; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheLayout:
        """Read what `to_json` wrote."""
        fields: dict[str, Any] = dict(data)
        fields["slots"] = tuple(_slot_from(slot) for slot in data["slots"])
        fields["once"] = tuple(data["once"])
        return cls(**fields)


def _slot_from(data: Mapping[str, Any]) -> Slot:
    fields: dict[str, Any] = dict(data)
    fields["shape"] = tuple(data["shape"])
    return Slot(**fields)
