"""Codes of 2, 4 and 8 bits in bytes, and back.

The layout is that of ONNX Runtime's `MatMulNBits`: for a weight ``[out, in]`` the codes of one
block lie in consecutive bytes, low bits first. Codes are unsigned; a weight is
``scale * (code - zero_point)``, and without zero points the zero is ``2**(bits - 1)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (2, 4, 8)
"""The bit widths that pack into bytes without crossing them."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the last axis of `codes`.

    Args:
        codes: Integers in ``[0, 2**bits)``, ``[..., n]``.
        bits: 2, 4 or 8.

    Returns:
        uint8, ``[..., ceil(n * bits / 8)]``; missing codes at the end are zero.

    Raises:
        ValueError: `bits` is not one of `WIDTHS`, or a code does not fit.
    """
    per_byte = _codes_per_byte(bits)
    if codes.numel():
        # A code that is too large would change its neighbors.
        least, most = (int(bound) for bound in codes.aminmax())
        if least < 0 or most >= 1 << bits:
            raise ValueError(f"codes of {bits} bits lie in [0, {1 << bits}), got {least} to {most}")
    codes = codes.to(torch.uint8)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    lanes = padded.unflatten(-1, (-1, per_byte))
    packed = torch.zeros_like(lanes[..., 0])
    for lane in range(per_byte):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of the last axis, as uint8 (the inverse of `pack`)."""
    per_byte = _codes_per_byte(bits)
    mask = (1 << bits) - 1
    lanes = [(packed >> (lane * bits)) & mask for lane in range(per_byte)]
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :count]


def dequantize(
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: int,
    block: int,
    features: int,
) -> Tensor:
    """The weight ``[..., features]`` of packed codes ``[..., blocks, block * bits / 8]``.

    The result has the dtype of `scales`.
    """
    blocks = scales.shape[-1]
    codes = unpack(packed, bits, block).to(scales.dtype)
    if zero_points is None:
        zeros = torch.full_like(scales, float(1 << (bits - 1)))
    else:
        zeros = unpack(zero_points, bits, blocks).to(scales.dtype)
    values = (codes - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    return values.flatten(-2)[..., :features]


def _codes_per_byte(bits: int) -> int:
    if bits not in WIDTHS:
        raise ValueError(f"codes of {bits} bits don't pack into bytes; use one of {WIDTHS}")
    return 8 // bits
