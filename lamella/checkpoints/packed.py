"""A weight that a graph holds in few bits, as its codes and as the numbers they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.ir.packing import dequantize, grid_bits, pack_dense, shift_of, unpack


@dataclass(frozen=True)
class Packed:
    """A weight ``[out, in]`` in blocks of 2 to 8 bits.

    Codes of a grid of 3, 5 or 6 bits are held in 4 or 8, see `lamella.ir.quantize`; here they are
    those of the grid.

    Attributes:
        graph: Holds it.
        reader: The `linear_nbits` or `embedding_nbits` that reads it.
        shape: ``(out, in)``.
    """

    graph: Graph
    reader: Node
    shape: tuple[int, int]

    @cached_property
    def bits(self) -> int:
        """Width of the grid, found by the codes: 2, 3, 4, 5, 6 or 8."""
        return grid_bits(self._held(), self.held_bits, self.zeros())

    @property
    def held_bits(self) -> int:
        """Width in which the graph holds the codes: 2, 4 or 8."""
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
        if self.bits == self.held_bits:
            return self.graph.weight(self._operand("packed"))
        return pack_dense(self.codes(), self.bits)

    def codes(self) -> Tensor:
        """One code per entry, uint8, ``[out, blocks, block]``; rows end in padding."""
        shift = shift_of(self.bits, self.held_bits) if self.is_symmetric else 0
        return self._held() - shift

    def scales(self) -> Tensor:
        """``[out, blocks]`` as they are stored."""
        return self.graph.weight(self._operand("scales"))

    def zeros(self) -> Tensor | None:
        """One zero point per block, uint8, ``[out, blocks]``; None when symmetric."""
        zeros = self._operand("zero_points")
        if zeros is None:
            return None
        return unpack(self.graph.weight(zeros), self.held_bits, self.scales().shape[-1])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as `dtype`, with the roundings that the operator makes."""
        scales = self.scales()
        if not self.is_embedding:
            # The linear layer multiplies in single precision, the lookup as scales are stored.
            scales = scales.to(torch.promote_types(scales.dtype, torch.float32))
        zeros = self._operand("zero_points")
        stored = None if zeros is None else self.graph.weight(zeros)
        held, grid = self.graph.weight(self._operand("packed")), (self.held_bits, self.block)
        return dequantize(held, scales, stored, *grid, self.shape[1]).to(dtype)

    def _held(self) -> Tensor:
        return unpack(self.graph.weight(self._operand("packed")), self.held_bits, self.block)

    def _operand(self, name: str) -> Any:
        return ops.bind(self.reader)[name]
