"""Weights on grids of 2 to 8 bits: formats, their bytes, and rounding to nearest.

A weight ``[..., out, in]`` is cut along `in` into blocks that share a scale ``s`` and a zero
``z``. Codes are unsigned, and a weight is read back as ``s * (code - z)``:

- symmetric, full range: ``s = -m / 2**(bits-1)`` for the entry ``m`` of largest magnitude (the
  scale may be negative, so that ``m`` falls on the end of the range that reaches further), and
  ``z = 2**(bits-1)``;
- asymmetric: ``lo = min(w, 0)``, ``hi = max(w, 0)``, ``s = (hi - lo) / (2**bits - 1)`` and
  ``z = round(-lo / s)``.

The scale is then shrunk by the factors of `SHRINK` and the one with the least squared error is
kept, each block for itself. Codes are computed from the scale *as it is stored*.

There are kernels for 2, 4 and 8 bits. Codes of 3, 5 and 6 bits are kept in the next of these:
symmetric ones are shifted so that zero is the middle code of the wider width, the others stay.
They stand for exactly the weights of the narrow grid, and take the memory and time of the wider
kernel; only checkpoints store them in their own width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from lamella.ir.packing import dequantize, pack, shift_of

BITS = (2, 3, 4, 5, 6, 8, 32)
"""Widths of a format; 32 means that the weight stays as it is."""

KERNEL_BITS: Mapping[int, int] = MappingProxyType({2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8, 32: 32})
"""Width of a grid -> the width in which kernels read its codes."""

BLOCKS = (32, 64, 128, 256)
"""Weights that share a scale."""

USUAL_BLOCKS = BLOCKS[:3]
"""Those that are compared where nobody says which: each costs scores and measurements."""

SCALE_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float16": torch.float16, "float32": torch.float32}
)
"""How scales may be stored, by name."""

SHRINK = MappingProxyType(
    {
        2: tuple(1 - 0.02 * step for step in range(26)),
        3: tuple(1 - 0.02 * step for step in range(21)),
        4: tuple(1 - 0.015 * step for step in range(21)),
        5: tuple(1 - 0.01 * step for step in range(21)),
        6: tuple(1 - 0.0075 * step for step in range(13)),
        # Rounding at 8 bits leaves little to clip: only near the full range there is a gain.
        8: tuple(1 - 0.0025 * step for step in range(9)),
    }
)
"""Factors by which a scale is shrunk in the search, by bit width."""

_CHUNK = 1 << 18
"""Entries of a weight that are worked on at a time; a few buffers of it fit into a cache."""


@dataclass(frozen=True)
class Format:
    """How the entries of a weight are stored.

    Attributes:
        bits: 2, 3, 4, 5, 6, 8, or 32 for a weight that stays as it is.
        block: Entries along the last axis that share a scale: 32, 64, 128, or 256 but for 2 bits.
        symmetric: Zero is the code ``2**(bits-1)``; otherwise each block stores its zero.
        scale_dtype: float16 or float32.

    Raises:
        ValueError: A field is not one of these.
    """

    bits: int = 4
    block: int = 32
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, BITS)
        blocks = blocks_of(self.bits)
        _one_of("block" if blocks == BLOCKS else f"block of {self.bits} bits", self.block, blocks)
        _one_of("scale_dtype", self.scale_dtype, tuple(SCALE_DTYPES.values()))

    def __str__(self) -> str:
        if self.bits == 32:
            return "as it is"
        return f"{self.bits} bits/{self.block}{'' if self.symmetric else ' with zeros'}"

    @property
    def kernel_bits(self) -> int:
        """The width in which kernels read the codes: 2, 4, 8, or 32."""
        return KERNEL_BITS[self.bits]

    @property
    def is_storage_only(self) -> bool:
        """Whether codes are wider in memory than their grid, for want of a kernel."""
        return self.kernel_bits != self.bits

    @property
    def shift(self) -> int:
        """What is added to a code of the grid where a kernel reads it."""
        return shift_of(self.bits, self.kernel_bits) if self.symmetric else 0


@dataclass(frozen=True)
class Quantized:
    """A weight in codes, laid out as `lamella::linear_nbits` and `embedding_nbits` read it.

    Attributes:
        packed: uint8, ``[..., blocks, block * kernel_bits / 8]``.
        scales: ``[..., blocks]`` of the format's dtype.
        zero_points: uint8, ``[..., ceil(blocks * kernel_bits / 8)]``, or None when symmetric.
        format: The format.
        shape: The shape of the weight.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    format: Format
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        format: Format,
        features: int,
    ) -> Quantized:
        """Pack codes of the grid of `format`.

        Args:
            codes: Integers in ``[0, 2**bits)``, ``[..., blocks, block]``; what lies behind
                `features` should be the zero of its block.
            scales: ``[..., blocks]``.
            zeros: Integers in ``[0, 2**bits)``, ``[..., blocks]``; None when symmetric.
            format: The format.
            features: Length of the last axis of the weight.

        Raises:
            ValueError: A code doesn't fit.
        """
        packed_zeros = None if zeros is None else pack(zeros, format.kernel_bits)
        packed = pack(codes.to(torch.int16) + format.shift, format.kernel_bits)
        stored = scales.to(format.scale_dtype)
        return cls(packed, stored, packed_zeros, format, (*codes.shape[:-2], features))

    def dequantized(self) -> Tensor:
        """The weight that the codes stand for, as float32."""
        bits, block, features = self.format.kernel_bits, self.format.block, self.shape[-1]
        return dequantize(self.packed, self.scales.float(), self.zero_points, bits, block, features)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        tensors = (self.packed, self.scales, self.zero_points)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True)
class Integers:
    """A matrix of signed integers, laid out as `lamella::linear_int8` reads it.

    Attributes:
        codes: int8, ``[out, in]``.
        scales: float32, ``[out]``.
    """

    codes: Tensor
    scales: Tensor

    def dequantized(self) -> Tensor:
        """The weight that the codes stand for, as float32."""
        return self.codes * self.scales[:, None]


def blocks_of(bits: int) -> tuple[int, ...]:
    """The blocks that a width comes in; ONNX Runtime 1.31 has no fast kernel for 256 of 2 bits."""
    return BLOCKS[:3] if bits == 2 else BLOCKS


def weight_bytes(shape: Sequence[int], format: Format, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a weight of `shape` where kernels read it: codes, scales and zeros, exactly.

    These are the bytes in memory and in an ONNX file; `dense_bytes` are those of a checkpoint
    that stores 3, 5 and 6 bits in their own width.

    Args:
        shape: ``[..., in]``.
        format: The format.
        dtype: What the weight has when its format leaves it as it is.
    """
    return _bytes(shape, format, format.kernel_bits, dtype)


def dense_bytes(shape: Sequence[int], format: Format, dtype: torch.dtype = torch.float32) -> int:
    """As `weight_bytes`, with codes and zeros in the width of their grid (`pack_dense`)."""
    return _bytes(shape, format, format.bits, dtype)


def _bytes(shape: Sequence[int], format: Format, bits: int, dtype: torch.dtype) -> int:
    *rows, features = shape
    if bits == 32:
        return math.prod(shape) * dtype.itemsize
    blocks = math.ceil(features / format.block)
    row = blocks * (format.block * bits // 8 + format.scale_dtype.itemsize)
    if not format.symmetric:
        row += math.ceil(blocks * bits / 8)
    return math.prod(rows) * row


def wider_kernels(formats: Iterable[Format]) -> str:
    """What to say of formats whose codes run in a wider kernel; empty where there are none."""
    narrow = sorted({format.bits for format in formats if format.is_storage_only})
    if not narrow:
        return ""
    listed = ", ".join(f"{bits} bits are held in {KERNEL_BITS[bits]}" for bits in narrow)
    return (
        f"{listed}: there is no kernel for them, so that memory and time are those of the wider "
        f"width; checkpoints store them in their own"
    )


def quantize(weight: Tensor, format: Format, importance: Tensor | None = None) -> Quantized:
    """Round `weight` to nearest on the grid of `format`, with searched scales.

    Args:
        weight: Floating point, ``[..., in]``.
        format: Of 2 to 8 bits.
        importance: How much the squared error of each column counts, ``[in]``, not negative
            (for instance the mean square of the inputs); None counts all alike.

    Raises:
        ValueError: The format has 32 bits, the weight has less than two axes or an entry that
            is NaN or infinite, or `importance` doesn't fit.
    """
    rows, blocks = _rows_and_blocks(weight, format, importance)
    per_byte = 8 // format.kernel_bits
    packed = torch.empty(rows, blocks, format.block // per_byte, dtype=torch.uint8)
    scales = torch.empty(rows, blocks, dtype=format.scale_dtype)
    zeros = None if format.symmetric else torch.empty(rows, blocks, dtype=torch.uint8)
    for start, grid in _grids(weight, format, importance):
        count = grid.scale.numel() // blocks
        codes = grid.codes().t().reshape(count, blocks, format.block)
        packed[start : start + count] = pack(codes + format.shift, format.kernel_bits)
        scales[start : start + count] = grid.scale.reshape(count, blocks)
        if zeros is not None:
            zeros[start : start + count] = grid.zero.reshape(count, blocks).to(torch.uint8)
    leading = weight.shape[:-1]
    return Quantized(
        packed.reshape(*leading, blocks, -1),
        scales.reshape(*leading, blocks),
        None if zeros is None else pack(zeros, format.kernel_bits).reshape(*leading, -1),
        format,
        tuple(weight.shape),
    )


def integers(weight: Tensor, importance: Tensor | None = None) -> Integers:
    """Round `weight` to 8 bits with one searched scale for each row, symmetric.

    Args:
        weight: Floating point, ``[out, in]``.
        importance: As for `quantize`.

    Raises:
        ValueError: As `quantize`.
    """
    format = Format(bits=8, scale_dtype=torch.float32)
    _rows_and_blocks(weight, format, importance)
    out, features = weight.shape
    codes = torch.empty(out, features, dtype=torch.int8)
    scales = torch.empty(out)
    column = None if importance is None else importance.float()[:, None]
    step = max(1, _CHUNK // max(features, 1))
    for start in range(0, out, step):
        rows = weight.detach()[start : start + step].float()
        grid = _searched(rows.t().contiguous(), format, column)
        codes[start : start + step] = (grid.codes() - grid.zero).t()
        scales[start : start + step] = grid.scale
    return Integers(codes, scales)


def dequantized(weight: Tensor, format: Format, importance: Tensor | None = None) -> Tensor:
    """What `weight` becomes in `format`: as ``quantize(...).dequantized()``, without packing.

    Returns:
        A new tensor of the shape and dtype of `weight`; `weight` itself for 32 bits.

    Raises:
        ValueError: As `quantize`.
    """
    if format.bits == 32:
        return weight
    _, blocks = _rows_and_blocks(weight, format, importance)
    features = weight.shape[-1]
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    flat = result.view(-1, features)
    for start, grid in _grids(weight, format, importance):
        count = grid.scale.numel() // blocks
        values = ((grid.codes() - grid.zero) * grid.scale).t().reshape(count, -1)
        flat[start : start + count] = values[:, :features]
    return result


@dataclass(frozen=True)
class _Grid:
    """Blocks of a weight as columns, ``[block, blocks]``, and the grid chosen for each."""

    entries: Tensor
    scale: Tensor
    zero: Tensor
    top: int

    def codes(self) -> Tensor:
        """Codes in ``[0, top]`` as float32, ``[block, blocks]``."""
        return (self.entries / self.scale).round_().add_(self.zero).clamp_(0, self.top)

    def error(self, importance: Tensor | None, buffer: Tensor) -> Tensor:
        """Squared error of each block, weighted by `importance`; ``[blocks]``."""
        torch.div(self.entries, self.scale, out=buffer)
        buffer.round_()
        torch.clamp(buffer, -self.zero, self.top - self.zero, out=buffer)
        torch.addcmul(self.entries, buffer, self.scale, value=-1, out=buffer)
        buffer.square_()
        return buffer.sum(0) if importance is None else buffer.mul_(importance).sum(0)


def _grids(
    weight: Tensor, format: Format, importance: Tensor | None
) -> Iterator[tuple[int, _Grid]]:
    """The first row and the grids of each chunk of rows."""
    flat = weight.detach().reshape(-1, weight.shape[-1])
    features = weight.shape[-1]
    pad = -features % format.block
    step = max(1, _CHUNK // (features + pad))
    columns = None
    if importance is not None:
        padded = functional.pad(importance.float(), (0, pad))
        columns = padded.reshape(-1, format.block).t()
    for start in range(0, flat.shape[0], step):
        chunk = functional.pad(flat[start : start + step].float(), (0, pad))
        entries = chunk.reshape(-1, format.block).t().contiguous()
        tiled = None if columns is None else columns.repeat(1, chunk.shape[0])
        yield start, _searched(entries, format, tiled)


def _searched(entries: Tensor, format: Format, importance: Tensor | None) -> _Grid:
    """The grid of least error among the shrunk ones."""
    low, high = entries.amin(0), entries.amax(0)
    if not torch.isfinite(high - low).all():
        count = int((~torch.isfinite(entries)).sum())
        raise ValueError(f"{max(count, 1)} entries are NaN, infinite or out of range")
    buffer = torch.empty_like(entries)
    candidates = [_grid(entries, low, high, format, shrink) for shrink in SHRINK[format.bits]]
    best = candidates[0]
    least = best.error(importance, buffer)
    scale, zero = best.scale.clone(), best.zero.clone()
    for candidate in candidates[1:]:
        error = candidate.error(importance, buffer)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, candidate.scale, scale)
        zero = torch.where(better, candidate.zero, zero)
    return _Grid(entries, scale, zero, best.top)


def _grid(entries: Tensor, low: Tensor, high: Tensor, format: Format, shrink: float) -> _Grid:
    """The grid that covers ``[low, high]`` shrunk towards zero, with the scale as stored."""
    top = (1 << format.bits) - 1
    if format.symmetric:
        half = 1 << (format.bits - 1)
        extreme = torch.where(-low >= high, low, high)
        scale = _stored(extreme * (-shrink / half), format)
        return _Grid(entries, scale, torch.full_like(scale, float(half)), top)
    low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
    scale = _stored((high - low) / top, format)
    return _Grid(entries, scale, (-low / scale).round_().clamp_(0, top), top)


def _stored(scale: Tensor, format: Format) -> Tensor:
    """`scale` as its dtype stores it, never zero and never infinite; a block of zeros has 1."""
    info = torch.finfo(format.scale_dtype)
    magnitude = scale.abs().clamp(info.smallest_normal * info.eps, info.max)
    rounded = torch.copysign(magnitude, scale).to(format.scale_dtype).float()
    return torch.where(scale == 0, torch.ones_like(scale), rounded)


def _rows_and_blocks(weight: Tensor, format: Format, importance: Tensor | None) -> tuple[int, int]:
    if format.bits == 32:
        raise ValueError("a format of 32 bits leaves a weight as it is; there are no codes")
    if weight.ndim < 2 or not weight.is_floating_point():
        raise ValueError(
            f"a weight to quantize is floating point with at least two axes, got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    features = weight.shape[-1]
    if importance is not None:
        if importance.shape != (features,):
            raise ValueError(
                f"importance has shape {list(importance.shape)}, the weight has {features} columns"
            )
        if not (torch.isfinite(importance).all() and (importance >= 0).all()):
            raise ValueError("importance holds entries that are negative, NaN or infinite")
    return math.prod(weight.shape[:-1]), math.ceil(features / format.block)


def _one_of(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value}")
