"""Weights in the block types of GGUF.

A block type stores 32 neighbors of a row with a float16 scale ``d``: ``Q8_0`` is ``d * q`` with
``q`` in [-128, 127], ``Q4_0`` is ``d * (q - 8)`` and ``Q4_1`` is ``d * q + m``. Symmetric codes of
Lamella are of this form, whatever their block (a larger block repeats its scale), so that they go
over without being rounded again. There is no legacy type of 2 bits: such codes are stored in 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

import torch
from torch import Tensor

from lamella.checkpoints.packed import Packed
from lamella.checkpoints.weights import Weight
from lamella.errors import CheckpointError

GROUP = 32
"""Neighbors in a row that a block type stores together."""


class Kind(IntEnum):
    """The types of tensors that are written, by their numbers in the format."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8
    BF16 = 30


_PLAIN = MappingProxyType(
    {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
)
_GROUP_BYTES = MappingProxyType({Kind.Q4_0: 18, Kind.Q4_1: 20, Kind.Q8_0: 34})

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
    kind = _kind_of(packed)
    width = packed.shape[1] // GROUP * _GROUP_BYTES[kind]
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


def _kind_of(packed: Packed) -> Kind:
    if packed.bits == 8:
        return Kind.Q8_0
    return Kind.Q4_0 if packed.is_symmetric else Kind.Q4_1


def _note(packed: Packed, kind: Kind) -> str:
    parts: list[str] = []
    if packed.bits == 2:
        parts.append("2 bits stored in 4")
    if not packed.is_symmetric:
        again = "rounded again without zero points" if kind is Kind.Q8_0 else "rounded offsets"
        parts.append(again)
    elif not torch.equal(packed.scales().half().float(), packed.scales().float()):
        parts.append("scales rounded to float16")
    return ", ".join(parts)


def _blocks(packed: Packed, kind: Kind, order: Rows) -> Tensor:
    """The bytes of a weight, ``[rows, bytes]``."""
    if kind is Kind.Q8_0 and not packed.is_symmetric:
        return _rounded(order(packed.dequantized(torch.float32)))
    rows, columns = packed.shape
    groups = columns // GROUP
    repeat = packed.block // GROUP
    codes = order(packed.codes().reshape(rows, -1)[:, :columns]).reshape(rows, groups, GROUP)
    scales = order(packed.scales().half()).repeat_interleave(repeat, dim=1)[:, :groups]
    if kind is Kind.Q8_0:
        return _joined(scales, values=(codes.int() - 128).to(torch.int8))
    if kind is Kind.Q4_0:
        # Zero is the code 8 there.
        codes = codes + (8 - (1 << (packed.bits - 1)))
        return _joined(scales, values=_nibbles(codes))
    zeros = packed.zeros()
    assert zeros is not None
    offsets = -packed.scales().float() * zeros.float()
    offsets = order(offsets.half()).repeat_interleave(repeat, dim=1)[:, :groups]
    return _joined(scales, offsets, values=_nibbles(codes))


def _rounded(value: Tensor) -> Tensor:
    """To the nearest ``Q8_0``."""
    grouped = value.reshape(value.shape[0], -1, GROUP)
    scales = (grouped.abs().amax(-1) / 127).half()
    safe = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    codes = (grouped / safe.unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8)
    return _joined(scales, values=codes)


def _nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte: the first half of a group in the low bits, the second in the high."""
    half = GROUP // 2
    return codes[..., :half] | (codes[..., half:] << 4)


def _joined(*halves: Tensor, values: Tensor) -> Tensor:
    """Scales (and offsets) before the codes of each group, ``[rows, bytes]``."""
    front = [half.contiguous().view(torch.uint8).unflatten(-1, (-1, 2)) for half in halves]
    return torch.cat([*front, values.contiguous().view(torch.uint8)], dim=-1).flatten(1)
