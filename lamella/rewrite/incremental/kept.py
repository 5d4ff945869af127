"""How the cache holds keys and values: as they are, or as codes of 8 bits.

A graph of whole sequences that rounds what an attention reads, ``scale * (code - 128)`` with a
scale for each channel of each head, says that the cache holds the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.symbols import shape_of

BITS = 8
ZERO = 128
"""The code of zero, which signed codes of 8 bits have at 0."""


@dataclass(frozen=True)
class Kept:
    """Keys or values of an attention.

    Attributes:
        rows: What the layer computes for new tokens, ``[batch, kv_heads, new, width]``.
        scale: What a code stands for, ``[kv_heads, 1, width]``; None where rows are kept as they
            are.
    """

    rows: Node
    scale: Node | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries of the cache."""
        return self.rows.meta["val"].dtype if self.scale is None else torch.int8


def kept(graph: Graph, rows: Node) -> Kept:
    """How the cache holds what an attention reads as keys or values."""
    if rows.target is not torch.ops.lamella.round_uniform.default:
        return Kept(rows)
    bound = ops.bind(rows)
    scale, zero = bound["scale"], bound["zero"]
    _, heads, _, width = shape_of(rows)
    fits = bound["bits"] == BITS and tuple(shape_of(scale)) == (heads, 1, width)
    constant = scale.op == "get_attr" and zero.op == "get_attr"
    if not (fits and constant and bool((graph.weight(zero) == ZERO).all())):
        return Kept(rows)
    return Kept(bound["input"], scale)
