"""Weights in the block types of GGUF.

A block type stores 32 neighbors of a row with a float16 scale ``d``: ``Q8_0`` is ``d * q`` with
``q`` in [-128, 127], ``Q4_0`` is ``d * (q - 8)`` and ``Q4_1`` is ``d * q + m``; ``Q5_0`` and
``Q5_1`` likewise. Symmetric codes of Lamella are of this form, whatever their block (a larger
block repeats its scale), so that they go over without being rounded again.

There are types of 2, 3 and 6 bits for rows of whole groups of 256 only (``Q2_K``, ``Q3_K``,
``Q6_K``); they round the scales to multiples of one. Other rows are stored in 4 or 8 bits, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

import torch
from torch import Tensor

from lamella.checkpoints.gguf_blocks import (
    GROUP,
    SUBGROUP,
    SUPER,
    fives,
    nibbles,
    q2_k,
    q3_k,
    q6_k,
    whole,
)
from lamella.checkpoints.packed import Packed
from lamella.checkpoints.weights import Weight
from lamella.errors import CheckpointError


class Kind(IntEnum):
    """The types of tensors that are written, by their numbers in the format."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q6_K = 14
    BF16 = 30


_PLAIN = MappingProxyType(
    {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
)
_BYTES = MappingProxyType(
    {
        Kind.Q4_0: (18, GROUP),
        Kind.Q4_1: (20, GROUP),
        Kind.Q5_0: (22, GROUP),
        Kind.Q5_1: (24, GROUP),
        Kind.Q8_0: (34, GROUP),
        Kind.Q2_K: (84, SUPER),
        Kind.Q3_K: (110, SUPER),
        Kind.Q6_K: (210, SUPER),
    }
)
"""Bytes of how many neighbors."""

_EXACT = MappingProxyType(
    {
        (2, True): Kind.Q4_0,
        (2, False): Kind.Q4_1,
        (3, True): Kind.Q4_0,
        (3, False): Kind.Q4_1,
        (4, True): Kind.Q4_0,
        (4, False): Kind.Q4_1,
        (5, True): Kind.Q5_0,
        (5, False): Kind.Q5_1,
        (6, True): Kind.Q8_0,
        (6, False): Kind.Q8_0,
        (8, True): Kind.Q8_0,
        (8, False): Kind.Q8_0,
    }
)
"""Bits and whether symmetric -> the smallest type that has the codes."""

_SMALL = MappingProxyType(
    {
        (2, True): Kind.Q2_K,
        (2, False): Kind.Q2_K,
        (3, True): Kind.Q3_K,
        (6, True): Kind.Q6_K,
    }
)
"""Likewise, for rows of whole groups of 256; scales are rounded."""

Rows = Callable[[Tensor], Tensor]
"""Puts the rows of a weight into another order."""


@dataclass(frozen=True)
class Encoded:
    """A tensor of a GGUF file.

    Attributes:
        name: Its name there.
        kind: Its type.
        shape: What the bytes are laid out as: ``[rows, bytes of a row]``, or one axis.
        make: Makes the bytes, uint8 of that shape.
        note: What was rounded, for people; empty when every value is as in the graph.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel()


def encoded(name: str, weight: Weight, rows: Rows | None, shift: float = 0.0) -> Encoded:
    """How `weight` is stored under `name`.

    Args:
        name: Name in the file.
        weight: The weight.
        rows: Other order of its rows, or None.
        shift: Is added to every entry.

    Raises:
        CheckpointError: The format has no type for its dtype.
    """
    order: Rows = rows or (lambda value: value)
    packed = weight.packed
    if packed is None or packed.shape[1] % GROUP:
        return _plain(name, weight, order, shift)
    kind = kind_of(packed.bits, packed.is_symmetric, packed.shape[1])
    width = row_bytes(kind, packed.shape[1])
    note = _note(packed, kind)
    return Encoded(name, kind, (packed.shape[0], width), lambda: _blocks(packed, kind, order), note)


def _plain(name: str, weight: Weight, order: Rows, shift: float) -> Encoded:
    # Vectors are read in single precision by everybody.
    dtype = torch.float32 if len(weight.shape) == 1 else weight.dtype
    if dtype not in _PLAIN:
        raise CheckpointError(f"gguf has no type for {dtype} (weight {weight.name})")
    shape = (*weight.shape[:-1], weight.shape[-1] * dtype.itemsize)

    def make() -> Tensor:
        value = order(weight.read()).to(dtype) + (shift if shift else 0)
        return value.contiguous().view(torch.uint8).reshape(shape)

    note = ""
    if weight.packed is not None:
        note = f"rows of {weight.packed.shape[1]} are no whole groups of {GROUP}"
    return Encoded(name, _PLAIN[dtype], shape, make, note)


def kind_of(bits: int, is_symmetric: bool, columns: int) -> Kind:
    """The type that stores rows of `columns` codes, whole groups of 32."""
    grid = (bits, is_symmetric)
    small = None if columns % SUPER else _SMALL.get(grid)
    return _EXACT[grid] if small is None else small


def row_bytes(kind: Kind, columns: int) -> int:
    """Bytes of a row."""
    count, neighbors = _BYTES[kind]
    return columns // neighbors * count


def _note(packed: Packed, kind: Kind) -> str:
    parts: list[str] = []
    width = int(kind.name[1])
    if packed.bits != width:
        parts.append(f"{packed.bits} bits stored in {width}")
    if kind in _SMALL.values():
        parts.append("scales rounded to multiples of one for 256 neighbors")
    elif not packed.is_symmetric:
        again = "rounded again without zero points" if kind is Kind.Q8_0 else "rounded offsets"
        parts.append(again)
    elif not torch.equal(packed.scales().half().float(), packed.scales().float()):
        parts.append("scales rounded to float16")
    return ", ".join(parts)


def _blocks(packed: Packed, kind: Kind, order: Rows) -> Tensor:
    """The bytes of a weight, ``[rows, bytes]``."""
    if kind in _SMALL.values():
        return _small_blocks(packed, kind, order)
    if kind is Kind.Q8_0 and not packed.is_symmetric:
        return _rounded(order(packed.dequantized(torch.float32)))
    rows, columns = packed.shape
    groups = columns // GROUP
    repeat = packed.block // GROUP
    codes = order(packed.codes().reshape(rows, -1)[:, :columns]).reshape(rows, groups, GROUP)
    scales = order(packed.scales().half()).repeat_interleave(repeat, dim=1)[:, :groups]
    half = 1 << (packed.bits - 1)
    if kind is Kind.Q8_0:
        return whole(scales, values=(codes.int() - half).to(torch.int8))
    written = fives if kind in (Kind.Q5_0, Kind.Q5_1) else nibbles
    if packed.is_symmetric:
        # Zero is the middle code of the type.
        middle = 16 if kind is Kind.Q5_0 else 8
        return whole(scales, values=written(codes + (middle - half)))
    zeros = packed.zeros()
    assert zeros is not None
    offsets = -packed.scales().float() * zeros.float()
    offsets = order(offsets.half()).repeat_interleave(repeat, dim=1)[:, :groups]
    return whole(scales, offsets, values=written(codes))


def _small_blocks(packed: Packed, kind: Kind, order: Rows) -> Tensor:
    """The bytes of a weight in groups of 256 with scales of few bits."""
    supers = packed.shape[1] // SUPER
    repeat = packed.block // SUBGROUP
    scales = order(packed.scales().float()).repeat_interleave(repeat, dim=1)
    scales = scales[:, : supers * SUBGROUP].unflatten(1, (supers, SUBGROUP))
    if kind is not Kind.Q2_K:
        values = order(packed.dequantized(torch.float32)).unflatten(1, (supers, SUPER))
        return (q3_k if kind is Kind.Q3_K else q6_k)(scales, values)
    codes = order(packed.codes().flatten(1)[:, : packed.shape[1]])
    zeros = packed.zeros()
    zeros = torch.full_like(packed.scales(), 2.0) if zeros is None else zeros.float()
    zeros = order(zeros).repeat_interleave(repeat, dim=1)[:, : supers * SUBGROUP]
    # A scale is not negative there: codes are counted from the other end.
    turned = (scales < 0).repeat_interleave(SUBGROUP, dim=2)
    codes = codes.unflatten(1, (supers, SUPER))
    codes = torch.where(turned, 3 - codes, codes)
    zeros = zeros.unflatten(1, (supers, SUBGROUP))
    offsets = scales.abs() * torch.where(scales < 0, 3 - zeros, zeros)
    return q2_k(scales.abs(), offsets, codes)


def _rounded(value: Tensor) -> Tensor:
    """To the nearest ``Q8_0``."""
    grouped = value.reshape(value.shape[0], -1, GROUP)
    scales = (grouped.abs().amax(-1) / 127).half()
    safe = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    codes = (grouped / safe.unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8)
    return whole(scales, values=codes)
