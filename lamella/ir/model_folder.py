"""A folder with a model of Hugging Face: its config and its weight files, checked before use.

Only JSON and safetensors are read: nothing in a folder is ever run or unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from lamella.errors import ModelFileError
from lamella.ir.safetensors_file import Entry, read_header

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_PIECE = 1 << 24


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of a checkpoint.

    Attributes:
        path: The file.
        entry: Type, shape and place.
    """

    path: Path
    entry: Entry


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        ModelFileError: It is missing, no JSON, or no mapping.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"{str(path)!r} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelFileError(f"{str(path)!r} is no JSON ({error}); it is corrupt") from error
    if not isinstance(data, dict):
        raise ModelFileError(f"{str(path)!r} holds no mapping; it is no file of a model")
    return cast(dict[str, Any], data)


def read_weight_map(folder: Path) -> dict[str, StoredWeight]:
    """Every tensor in the safetensors files of a folder, by its name there.

    Headers are read and checked; data is not.

    Raises:
        ModelFileError: There are no such files, a shard is missing, a header lies, or the index
            names a file outside of the folder or a tensor that its shard doesn't hold.
    """
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if (folder / SINGLE).is_file():
        return _stored(folder / SINGLE)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return _stored(others[0])
    raise _no_weights(folder, others)


def check_finite(weights: Mapping[str, StoredWeight]) -> None:
    """Read all data once, a piece at a time, and look for NaN and Inf.

    Raises:
        ModelFileError: Some weights hold them; all are named.
    """
    bad = [f"{name} ({what})" for name, what in _not_finite(weights)]
    if bad:
        raise ModelFileError(
            f"the checkpoint holds numbers that are no numbers in {', '.join(bad)}; it can't be "
            f"compiled, get an intact one"
        )


def _not_finite(weights: Mapping[str, StoredWeight]) -> Iterator[tuple[str, str]]:
    for path in dict.fromkeys(stored.path for stored in weights.values()):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, stored in weights.items() if stored.path == path):
                dtype = weights[name].entry.dtype
                # Eight-bit floats come with scales of their own, and torch can't compare them.
                if not dtype.is_floating_point or dtype.itemsize == 1:
                    continue
                pieces = file.get_tensor(name).flatten().split(_PIECE)
                if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
                    nan = any(bool(torch.isnan(piece).any()) for piece in pieces)
                    yield name, "NaN" if nan else "Inf"


def _stored(path: Path) -> dict[str, StoredWeight]:
    return {name: StoredWeight(path, entry) for name, entry in read_header(path).items()}


def _sharded(folder: Path) -> dict[str, StoredWeight]:
    index = read_json(folder / INDEX)
    for part in ("weight_map", "metadata"):
        if not isinstance(index.get(part), dict):
            raise ModelFileError(f"{str(folder / INDEX)!r} has no {part}; it is corrupt")
    named = cast(dict[str, Any], index["weight_map"])
    shards = sorted({str(shard) for shard in named.values()})
    # By name only: the cache of the hub keeps its files behind links.
    outside = [shard for shard in shards if Path(shard).name != shard or shard in ("", "..", ".")]
    if outside:
        raise ModelFileError(
            f"{str(folder / INDEX)!r} names files outside of its folder: {', '.join(outside)}"
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelFileError(
            f"{str(folder)!r} lacks {', '.join(missing)}, which its index names; download it again"
        )
    found: dict[str, StoredWeight] = {}
    for shard in shards:
        found |= _stored(folder / shard)
    lost = [name for name, shard in named.items() if _file_of(found, name) != str(shard)]
    if lost:
        raise ModelFileError(
            f"{str(folder / INDEX)!r} names tensors that their files don't hold: {', '.join(lost)}"
        )
    return found


def _file_of(found: Mapping[str, StoredWeight], name: str) -> str:
    return found[name].path.name if name in found else ""


def _no_weights(folder: Path, others: list[Path]) -> ModelFileError:
    if others:
        names = ", ".join(path.name for path in others)
        return ModelFileError(f"{str(folder)!r} has several weight files but no {INDEX}: {names}")
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        return ModelFileError(
            f"{str(folder)!r} holds its weights as a pickle ({', '.join(pickles)}), which can run "
            f"code when it is read; load it with transformers where you trust it, and save it "
            f"with model.save_pretrained(folder), which writes safetensors"
        )
    return ModelFileError(f"{str(folder)!r} has no weights: it holds no .safetensors file")
