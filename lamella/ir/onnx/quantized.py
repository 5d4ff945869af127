"""Constant weights of few bits, which stay packed where a linear layer reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.ir.packing import WIDTHS, pack


@dataclass(frozen=True, eq=False)
class Quantized:
    """What a ``DequantizeLinear`` of constants stands for: ``(codes - zero) scale``.

    Attributes:
        codes: int8, uint8 or wider integers, one per element.
        scale: A number, a vector along `axis`, or as `codes` with one per block of `axis`.
        zero: As `scale`, or None for zero.
        axis: The axis of `scale`.
        block: Elements along `axis` that share a scale; 0 if the scale is no blocked one.
        bits: Bits of each code.
        name: What a weight made of it is called.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    axis: int
    block: int
    bits: int
    name: str

    def dequantized(self) -> Tensor:
        """The numbers, in the type of the scales."""
        wide = self.codes.to(self.scale.dtype)
        if self.zero is not None:
            wide = wide - self._spread(self.zero.to(self.scale.dtype))
        return wide * self._spread(self.scale)

    def fits_linear(self, axis: int) -> bool:
        """Whether `packed` gives a matrix whose inner axis is `axis`."""
        blocked = self.codes.ndim == 2 and self.axis == axis and self.block > 0
        return blocked and self.bits in WIDTHS and self.block * self.bits % 8 == 0

    def packed(self, axis: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zero points as `lamella::linear_nbits` takes them.

        Args:
            axis: The axis of the matrix that is summed over.

        Returns:
            ``[out, blocks, block * bits / 8]``, ``[out, blocks]``, and None or
            ``[out, ceil(blocks * bits / 8)]``.
        """
        scales, codes = self.scale.movedim(axis, 1), self.codes.movedim(axis, 1)
        half = 1 << (self.bits - 1)
        signed = codes.dtype.is_signed
        shift = half if signed else 0
        blocks = scales.shape[1]
        short = blocks * self.block - codes.shape[1]
        lifted = torch.nn.functional.pad(codes.to(torch.int16) + shift, (0, short), value=half)
        data = pack(lifted.unflatten(1, (blocks, self.block)), self.bits)
        if self.zero is None:
            # Without zero points the middle of the range is zero.
            zeros = None if signed else torch.zeros_like(scales, dtype=torch.int16)
        else:
            zeros = self.zero.movedim(axis, 1).to(torch.int16) + shift
        packed_zeros = None if zeros is None else pack(zeros, self.bits)
        return data.contiguous(), scales.contiguous(), packed_zeros

    def _spread(self, numbers: Tensor) -> Tensor:
        """`numbers` so that they broadcast against the codes."""
        if self.block:
            size = self.codes.shape[self.axis]
            return numbers.repeat_interleave(self.block, self.axis).narrow(self.axis, 0, size)
        if numbers.numel() == 1:
            return numbers.reshape(())
        shape = [1] * self.codes.ndim
        shape[self.axis] = numbers.numel()
        return numbers.reshape(shape)
