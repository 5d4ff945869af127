"""The header of a safetensors file, read and checked before any data is.

A file is eight bytes (the length of the header), the header (JSON: name -> dtype, shape, offsets)
and the data. A corrupt or malicious file can lie in each of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from lamella.errors import ModelFileError

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes of the format that can be read."""

_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        dtype: Of the elements.
        shape: Of the tensor.
        start: First byte, from the start of the data.
        stop: One past the last byte.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file.

    Raises:
        ModelFileError: The file is missing or truncated, or its header is no header, names a
            type or shape that can't be, or places tensors outside the file or over each other.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise _bad(path, f"its header should have {length} bytes, the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise ModelFileError(f"{str(path)!r} can't be read: {error.strerror}") from error
    entries = {
        name: _entry(path, name, value)
        for name, value in _parsed(path, text).items()
        if name != "__metadata__"
    }
    _check_places(path, entries, size - 8 - length)
    return entries


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise _bad(path, "its header is no JSON") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is no mapping of names to tensors")
    return cast(dict[str, Any], header)


def _entry(path: Path, name: str, value: Any) -> Entry:
    fields = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    dtype = DTYPES.get(str(fields.get("dtype")))
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if dtype is None:
        raise _bad(path, f"tensor {name!r} has the unknown type {fields.get('dtype')!r}")
    if not _counts(shape) or not _counts(offsets) or len(cast(list[int], offsets)) != 2:
        raise _bad(path, f"tensor {name!r} has no valid shape and offsets")
    start, stop = cast(list[int], offsets)
    sizes = tuple(cast(list[int], shape))
    if stop - start != math.prod(sizes) * dtype.itemsize:
        raise _bad(
            path,
            f"tensor {name!r} of shape {list(sizes)} needs {math.prod(sizes) * dtype.itemsize} "
            f"bytes and claims {stop - start}",
        )
    return Entry(dtype, sizes, start, stop)


def _counts(value: Any) -> bool:
    """Whether `value` is a list of numbers that are no less than zero."""
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0
        for item in cast(list[Any], value)
    )


def _check_places(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    """Tensors fill the data without gaps and overlaps."""
    end, previous = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < end:
            raise _bad(path, f"tensors {previous!r} and {name!r} overlap")
        if entry.start > end:
            raise _bad(path, f"there are {entry.start - end} unclaimed bytes before {name!r}")
        end, previous = entry.stop, name
    if end != size:
        raise _bad(path, f"its tensors need {end} bytes of data, the file has {size}")


def _bad(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{str(path)!r} is truncated or corrupt: {reason}; download or save it again"
    )
