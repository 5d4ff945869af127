"""The formats in which a backend can hold weights, as data.

A format is offered with the kernel that runs it, the shapes that the kernel takes, and the bytes
that a weight takes, exactly. What the kernel computes is what the canonical operator says: the
operator's reference implementation in PyTorch (`lamella.ir.operators`,
`lamella.ir.integer_operators`) *is* the emulator of the format, with the rounding of activations
that the kernel makes. Weights are the same bit for bit; results agree up to `tolerance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lamella.ir import ops
from lamella.ir.ops import aten, lam
from lamella.ir.packing import WIDTHS
from lamella.ir.quantize import Format, blocks_of, weight_bytes

Activations = Literal["same", "int8-block", "int8-row", "int8-tensor", "int8-static", "bfloat16"]
Role = Literal["linear", "embedding", "convolution"]
Shape = tuple[int, ...]

EXACT = 1e-5
"""Results of kernels whose products are exact: sums of float32 in another order."""


def any_shape(shape: Shape) -> str:
    """No obstacle."""
    return ""


@dataclass(frozen=True)
class QuantFormat:
    """How a backend holds the weight of a layer, and what runs it.

    Attributes:
        name: What people call it: ``4/32`` (bits/block, ``z`` with zero points), ``int8-rows``, ….
        role: The layer.
        operator: The canonical operator; its reference is the emulator.
        bits: Of a code; 32 for floats, 16 for bfloat16.
        kernel: What runs it.
        block: Entries of a row that share a scale; 0 for one scale per output, or none.
        symmetric: Without zero points.
        scales: Type of the scales, or None.
        activations: How inputs are rounded: as the kernel does it, in the emulator too, except
            for ``"bfloat16"``, which `tolerance` covers.
        tolerance: How far results may be from those of the emulator, over the largest result.
        obstacle: Why the kernel can't take a weight of a shape, or nothing.
        padded: Rows of codes are filled up to whole blocks, and rows of zero points to whole
            bytes; otherwise only the last byte of all codes is.
        held_bits: Of a code in files, where that depends on the shape.
    """

    name: str
    role: Role
    operator: Callable[..., Any]
    bits: int
    kernel: str
    block: int = 0
    symmetric: bool = True
    scales: torch.dtype | None = None
    activations: Activations = "same"
    tolerance: float = EXACT
    obstacle: Callable[[Shape], str] = any_shape
    padded: bool = True
    held_bits: Callable[[Shape], int] | None = None

    def __str__(self) -> str:
        return self.name if self.role == "linear" else f"{self.role} {self.name}"

    @property
    def storage(self) -> Format | None:
        """Codes and scales of blocks; None for other formats."""
        if not self.block:
            return None
        return Format(self.bits, self.block, self.symmetric, self.scales or torch.float16)

    def weight_bytes(self, shape: Shape, *, bias: bool = False) -> int:
        """Bytes that files hold for a weight ``[out, ..., in]``: codes, scales and zeros.

        Args:
            shape: Of the weight.
            bias: With the bias of a convolution of integers, which is stored with its unit, 8
                bytes for an output instead of 4; of other layers it does not depend on the format.
        """
        entries = torch.Size(shape).numel()
        if self.storage is not None and self.padded:
            return weight_bytes(shape, self.storage)
        if self.storage is not None:
            bits = self.bits if self.held_bits is None else self.held_bits(shape)
            blocks = entries // shape[-1] * -(-shape[-1] // self.block)
            zeros = 0 if self.symmetric else -(-blocks * bits // 8)
            scales = blocks * self.storage.scale_dtype.itemsize
            return -(-entries * bits // 8) + scales + zeros
        if self.bits >= 16:
            return entries * self.bits // 8
        more = 8 if bias and self.role == "convolution" else 0
        return entries * self.bits // 8 + (4 + more) * shape[0]


def in_blocks(
    role: Role,
    kernel: str,
    widths: Sequence[int] = WIDTHS,
    activations: Activations = "int8-block",
    *,
    padded: bool = True,
) -> Iterator[QuantFormat]:
    """Codes in blocks of every width and size, without and with zero points."""
    operator = lam.linear_nbits.default if role == "linear" else lam.embedding_nbits.default
    for bits in widths:
        for block in blocks_of(bits):
            for symmetric in (True, False):
                yield QuantFormat(
                    f"{bits}/{block}{'' if symmetric else 'z'}",
                    role,
                    operator,
                    bits,
                    kernel,
                    block,
                    symmetric,
                    torch.float16,
                    "same" if role == "embedding" else activations,
                    padded=padded,
                )


def of_node(node: torch.fx.Node, formats: Sequence[QuantFormat]) -> QuantFormat | None:
    """The format among `formats` that a layer of a graph is in; None for other nodes."""
    alike = [one for one in formats if one.operator is node.target]
    if not alike or node.target in (aten.linear.default, aten.conv2d.default):
        return None
    bound = ops.bind(node)
    if "bits" in bound:
        grid = (int(bound["bits"]), int(bound["block"]), bound["zero_points"] is None)
        found = [one for one in alike if (one.bits, one.block, one.symmetric) == grid]
    elif "per_row" in bound:
        rounding = "int8-row" if bound["per_row"] else "int8-tensor"
        found = [one for one in alike if one.activations == rounding]
    else:
        found = alike
    return found[0] if found else None
