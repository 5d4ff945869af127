"""Safetensors files that are written one tensor at a time.

The library of the format wants all tensors of a file at once; here each is made, written and
forgotten, so that a model is never in memory twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lamella.checkpoints.names import Stored
from lamella.errors import CheckpointError
from lamella.ir.model_folder import INDEX, SINGLE
from lamella.ir.safetensors_file import DTYPES

_NAMES = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})


def write_shards(folder: Path, tensors: Iterable[Stored], max_shard_bytes: int) -> None:
    """Write ``model.safetensors``, or numbered shards and their index.

    Args:
        folder: Where.
        tensors: What, in this order; a tensor larger than a shard has one of its own.
        max_shard_bytes: Bytes of the tensors of a file.
    """
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0])
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        places |= dict.fromkeys((one.name for one in shard), name)
    total = sum(one.nbytes for shard in shards for one in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Sequence[Stored]) -> None:
    """Write one file; each tensor is made when its turn comes.

    Raises:
        CheckpointError: A type has no name in the format, or a tensor is not what was announced.
    """
    # Large items first: every tensor begins at a multiple of its item size.
    ordered = sorted(tensors, key=lambda one: -one.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in ordered:
        if one.dtype not in _NAMES:
            raise CheckpointError(f"safetensors has no name for {one.dtype} (weight {one.name})")
        header[one.name] = {
            "dtype": _NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [end, end + one.nbytes],
        }
        end += one.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for one in ordered:
            _bytes_of(one).numpy().tofile(file)


def _bytes_of(one: Stored) -> Tensor:
    value = one.make().detach()
    if tuple(value.shape) != one.shape or value.dtype != one.dtype:
        raise CheckpointError(
            f"weight {one.name} became {value.dtype} {list(value.shape)} instead of {one.dtype} "
            f"{list(one.shape)}"
        )
    return value.cpu().contiguous().reshape(-1).view(torch.uint8)


def _shards(tensors: Iterable[Stored], largest: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    size = 0
    for one in tensors:
        if shards[-1] and size + one.nbytes > largest:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.nbytes
    return shards
