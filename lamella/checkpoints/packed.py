"""A weight that a graph holds in few bits, as its codes and as the numbers they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.ir.packing import dequantize, unpack


@dataclass(frozen=True)
class Packed:
    """A weight ``[out, in]`` in blocks of 2, 4 or 8 bits.

    Attributes:
        graph: Holds it.
        reader: The `linear_nbits` or `embedding_nbits` that reads it.
        shape: ``(out, in)``.
    """

    graph: Graph
    reader: Node
    shape: tuple[int, int]

    @property
    def bits(self) -> int:
        """2, 4 or 8."""
        return int(self._operand("bits"))

    @property
    def block(self) -> int:
        """Entries of a row that share a scale."""
        return int(self._operand("block"))

    @property
    def is_symmetric(self) -> bool:
        """Whether zero is the middle code."""
        return self._operand("zero_points") is None

    @property
    def is_embedding(self) -> bool:
        """Whether rows are looked up in it."""
        return self.reader.target is lam.embedding_nbits.default

    def packed(self) -> Tensor:
        """Codes as bytes, ``[out, blocks, block * bits / 8]``, low bits first."""
        return self.graph.weight(self._operand("packed"))

    def codes(self) -> Tensor:
        """One code per entry, uint8, ``[out, blocks, block]``; rows end in padding."""
        return unpack(self.packed(), self.bits, self.block)

    def scales(self) -> Tensor:
        """``[out, blocks]`` as they are stored."""
        return self.graph.weight(self._operand("scales"))

    def zeros(self) -> Tensor | None:
        """One zero point per block, uint8, ``[out, blocks]``; None when symmetric."""
        zeros = self._operand("zero_points")
        if zeros is None:
            return None
        return unpack(self.graph.weight(zeros), self.bits, self.scales().shape[-1])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as `dtype`, with the roundings that the operator makes."""
        scales = self.scales()
        if not self.is_embedding:
            # The linear layer multiplies in single precision, the lookup as scales are stored.
            scales = scales.to(torch.promote_types(scales.dtype, torch.float32))
        zeros = self._operand("zero_points")
        stored = None if zeros is None else self.graph.weight(zeros)
        return dequantize(self.packed(), scales, stored, self.bits, self.block, self.shape[1]).to(
            dtype
        )

    def _operand(self, name: str) -> Any:
        return ops.bind(self.reader)[name]
