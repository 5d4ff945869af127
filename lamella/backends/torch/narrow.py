"""Codes of 3, 5 and 6 bits in files: a stream of bits, expanded again when it is read.

In memory such codes are as wide as the kernels read them; see `lamella.ir.packing`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamella.ir import ops
from lamella.ir.ops import lam
from lamella.ir.packing import grid_bits, pack, pack_dense, shift_of, unpack, unpack_dense

KEY = "lamella.narrow"
"""Key of the metadata of a file."""

_READERS = {ops.op_name(op): op for op in (lam.linear_nbits.default, lam.embedding_nbits.default)}


@dataclass(frozen=True)
class Narrow:
    """A tensor of codes that a file holds in the width of their grid.

    Attributes:
        bits: Of the grid.
        held: As kernels read them.
        shift: What was added to the codes for the kernels.
        shape: Of the codes, one by one.
    """

    bits: int
    held: int
    shift: int
    shape: tuple[int, ...]

    def stored(self, packed: Tensor) -> Tensor:
        """The stream of a tensor of packed codes."""
        codes = unpack(packed, self.held, self.shape[-1]) - self.shift
        return pack_dense(codes, self.bits).contiguous()

    def packed(self, stored: Tensor) -> Tensor:
        """The tensor of packed codes of a stream."""
        codes = unpack_dense(stored, self.bits, self.shape[-1])
        return pack(codes + self.shift, self.held).contiguous()


def find_narrow(nodes: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Narrow]:
    """The weights of a graph (as `graph_json` has it) whose codes are of a narrower grid."""
    targets = {r["name"]: r["target"] for r in nodes["nodes"] if r["op"] == "get_attr"}
    found: dict[str, Narrow] = {}
    for bound in _readers(nodes):
        packed, zeros = (_weight(bound.get(k), targets) for k in ("packed", "zero_points"))
        scales = _weight(bound.get("scales"), targets)
        if packed is None or scales is None or packed in found:
            continue
        bits, block, blocks = int(bound["bits"]), int(bound["block"]), weights[scales].shape[-1]
        codes = unpack(weights[packed], bits, block)
        known = None if zeros is None else unpack(weights[zeros], bits, blocks)
        grid = grid_bits(codes, bits, known)
        if grid != bits:
            shift = shift_of(grid, bits) if zeros is None else 0
            found[packed] = Narrow(grid, bits, shift, tuple(codes.shape))
            if zeros is not None and known is not None:
                found[zeros] = Narrow(grid, bits, 0, tuple(known.shape))
    return found


def to_text(narrow: Mapping[str, Narrow]) -> str:
    """JSON for the metadata of a file."""
    rows = {n: [one.bits, one.held, one.shift, list(one.shape)] for n, one in narrow.items()}
    return json.dumps(rows)


def from_text(text: str) -> dict[str, Narrow]:
    """Read `to_text`.

    Raises:
        ValueError: It is something else.
    """
    rows = json.loads(text)
    try:
        return {
            str(name): Narrow(int(bits), int(held), int(shift), tuple(map(int, shape)))
            for name, (bits, held, shift, shape) in rows.items()
        }
    except (TypeError, AttributeError) as error:
        raise ValueError(f"it does not say how codes are stored ({error})") from error


def _readers(nodes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments, by schema name, of the operators that read packed codes."""
    for record in nodes["nodes"]:
        op = _READERS.get(record["target"])
        if op is not None:
            names = ops.argument_names(op)
            yield dict(zip(names, record.get("args", ()), strict=False)) | record.get("kwargs", {})


def _weight(argument: Any, targets: Mapping[str, str]) -> str | None:
    """The name of the weight that an argument reads."""
    return targets.get(argument["node"]) if isinstance(argument, dict) else None


def bytes_of(tensors: Mapping[str, Tensor], narrow: Mapping[str, Narrow]) -> int:
    """Bytes of some weights as a file holds them."""
    total = 0
    for name, value in tensors.items():
        if name in narrow:
            one = narrow[name]
            rows = torch.Size(one.shape[:-1]).numel()
            total += rows * -(-one.shape[-1] * one.bits // 8)
        else:
            total += value.numel() * value.element_size()
    return total
