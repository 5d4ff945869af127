"""What was written as a checkpoint, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LISTED = 6


@dataclass(frozen=True)
class CheckpointReport:
    """What `save_checkpoint` wrote.

    Attributes:
        folder: Where.
        format: ``"huggingface"``, ``"compressed-tensors"`` or ``"gguf"``.
        files: Bytes of every file by name.
        types: How many weights are stored as what: ``{"float32": 12, "4 bits/32": 14}``.
        remarks: What is stored otherwise than the graph has it, and what was left out.
    """

    folder: str
    format: str
    files: Mapping[str, int]
    types: Mapping[str, int]
    remarks: tuple[str, ...] = ()

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.types.items())
        lines = [f"{self.format} in {self.folder}: {self.file_bytes:,} bytes ({kinds})"]
        return "\n".join([*lines, *(f"- {remark}" for remark in self.remarks)])


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
