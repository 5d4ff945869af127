"""The grid that the entries of a weight are rounded to, column by column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lamella.ir.packing import unpack
from lamella.ir.quantize import Format, Integers, Quantized, integers, quantize


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of a weight ``[out, in]``, laid out for work on columns.

    Attributes:
        format: The format.
        scales: As stored, ``[blocks, out]``.
        low: The lowest multiple of a scale, ``-zero``, ``[blocks, out]``.
        high: The highest.
        block: Columns that share a scale: those of the format, or all.
    """

    format: Format
    scales: Tensor
    low: Tensor
    high: Tensor
    block: int

    @classmethod
    def searched(cls, weight: Tensor, format: Format, importance: Tensor | None = None) -> Grid:
        """The grid of rounding to nearest: scales of least squared error, each block for itself.

        Args:
            weight: ``[out, in]``; its dtype is that of the work.
            format: Of fewer than 32 bits.
            importance: How much the error of each column counts, ``[in]``; None counts all alike.
        """
        return cls.of(quantize(weight, format, importance), weight.dtype)

    @classmethod
    def of(cls, stored: Quantized, dtype: torch.dtype = torch.float32) -> Grid:
        """The grid of a weight that is stored."""
        format = stored.format
        scales = stored.scales.to(dtype).t().contiguous()
        if stored.zero_points is None:
            zeros = torch.full_like(scales, float(1 << (format.bits - 1)))
        else:
            count = stored.scales.shape[-1]
            zeros = unpack(stored.zero_points, format.kernel_bits, count).to(dtype).t().contiguous()
        return cls(format, scales, -zeros, (1 << format.bits) - 1 - zeros, format.block)

    @classmethod
    def of_rows(cls, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """The grid of 8 bits with one scale for each row (see `lamella.ir.quantize.integers`).

        Args:
            weight: ``[out, in]``.
            importance: As for `searched`.
        """
        scales = integers(weight, importance).scales.to(weight.dtype)[None]
        format = Format(8, scale_dtype=torch.float32)
        low = torch.full_like(scales, -128.0)
        return cls(format, scales, low, low + 255, weight.shape[1])

    def nearest(self, column: int, values: Tensor) -> Tensor:
        """The entries of a column on the grid, ``[out]``."""
        block = column // self.block
        scale = self.scales[block]
        return (values / scale).round_().clamp_(self.low[block], self.high[block]).mul_(scale)

    def nearest_but(self, free: Tensor | None) -> Callable[[int, Tensor], Tensor]:
        """`nearest`, except for the columns marked in `free`, which stay as they are."""
        if free is None:
            return self.nearest
        kept = set(free.nonzero().flatten().tolist())
        return lambda column, values: (
            values.clone() if column in kept else self.nearest(column, values)
        )

    def store(self, values: Tensor) -> Quantized:
        """Codes of values that lie on the grid.

        Args:
            values: ``[in, out]``; each block of the format has its own scale.
        """
        features, out = values.shape
        blocks, block = self.scales.shape[0], self.format.block
        rows = functional.pad(values, (0, 0, 0, blocks * block - features))
        cut = rows.reshape(blocks, block, out)
        codes = (cut / self.scales[:, None]).round_().sub_(self.low[:, None])
        zeros = None if self.format.symmetric else (-self.low).t().to(torch.int16).contiguous()
        scales = self.scales.t().contiguous()
        return Quantized.of(codes.permute(2, 0, 1), scales, zeros, self.format, features)

    def store_rows(self, values: Tensor) -> Integers:
        """Codes of values that lie on a grid with one scale for each row.

        Args:
            values: ``[in, out]``.
        """
        codes = (values / self.scales).round_().to(torch.int8)
        return Integers(codes.t().contiguous(), self.scales[0].float())
