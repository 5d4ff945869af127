"""Codes of 2, 4 and 8 bits in bytes, and back.

The layout is that of ONNX Runtime's `MatMulNBits`: for a weight ``[out, in]`` the codes of one
block lie in consecutive bytes, low bits first. Codes are unsigned; a weight is
``scale * (code - zero_point)``, and without zero points the zero is ``2**(bits - 1)``.

Codes of a narrower grid (3, 5 or 6 bits) lie in this layout too, shifted where there are no zero
points (`shift_of`), and are found again by their range (`grid_bits`). `pack_dense` is the layout
of checkpoints, a stream of bits for any width.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

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
    _check_codes(codes, bits)
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


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Pack the last axis of `codes` of any width into one stream of bits, low bits first.

    For 2, 4 and 8 bits this is `pack`. Codes of other widths cross the borders of bytes; eight
    of them are `bits` bytes.

    Args:
        codes: Integers in ``[0, 2**bits)``, ``[..., n]``.
        bits: 1 to 8.

    Returns:
        uint8, ``[..., ceil(n * bits / 8)]``.

    Raises:
        ValueError: A code does not fit.
    """
    if bits in WIDTHS:
        return pack(codes, bits)
    _check_codes(codes, bits)
    count = codes.shape[-1]
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -count % 8))
    lanes = padded.unflatten(-1, (-1, 8)) << (torch.arange(8) * bits)
    numbers = lanes.sum(-1, keepdim=True)
    packed = (numbers >> (8 * torch.arange(bits))) & 0xFF
    return packed.to(torch.uint8).flatten(-2)[..., : -(-count * bits // 8)]


def unpack_dense(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of the last axis, as uint8 (the inverse of `pack_dense`)."""
    if bits in WIDTHS:
        return unpack(packed, bits, count)
    padded = torch.nn.functional.pad(packed.to(torch.int64), (0, -packed.shape[-1] % bits))
    lanes = padded.unflatten(-1, (-1, bits)) << (8 * torch.arange(bits))
    numbers = lanes.sum(-1, keepdim=True)
    codes = (numbers >> (bits * torch.arange(8))) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def shift_of(bits: int, wider: int) -> int:
    """What a code of `bits` without zero points is moved by in a `wider` width."""
    return (1 << (wider - 1)) - (1 << (bits - 1))


def grid_bits(codes: Tensor, bits: int, zeros: Tensor | None) -> int:
    """The width of the grid whose codes are held in `bits`: 3 in 4, 5 or 6 in 8, or `bits`.

    Args:
        codes: Codes as kernels read them, before they are packed; any shape.
        bits: The width in which they are held.
        zeros: Zero points likewise, or None.
    """
    if not codes.numel():
        return bits
    least, most = (int(bound) for bound in codes.aminmax())
    for narrow in _NARROWER.get(bits, ()):
        shift = shift_of(narrow, bits) if zeros is None else 0
        top = shift + (1 << narrow)
        if shift <= least and most < top and (zeros is None or int(zeros.max()) < top):
            return narrow
    return bits


_NARROWER: Mapping[int, tuple[int, ...]] = MappingProxyType({4: (3,), 8: (5, 6)})


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


def _check_codes(codes: Tensor, bits: int) -> None:
    if codes.numel():
        # A code that is too large would change its neighbors.
        least, most = (int(bound) for bound in codes.aminmax())
        if least < 0 or most >= 1 << bits:
            raise ValueError(f"codes of {bits} bits lie in [0, {1 << bits}), got {least} to {most}")


def _codes_per_byte(bits: int) -> int:
    if bits not in WIDTHS:
        raise ValueError(f"codes of {bits} bits don't pack into bytes; use one of {WIDTHS}")
    return 8 // bits
