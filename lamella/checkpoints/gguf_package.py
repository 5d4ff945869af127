"""The package `gguf`, imported when a file of that format is written."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamella.checkpoints.gguf_metadata import Value
from lamella.checkpoints.gguf_types import Encoded
from lamella.errors import CheckpointError


def check_installed() -> None:
    """Refuse the format where its package is missing.

    Raises:
        CheckpointError: It is.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            "format 'gguf' needs the package gguf; install it with "
            "pip install 'lamella[checkpoints]'"
        )


def tensor_names(architecture: str, layers: int) -> dict[str, str]:
    """Name of a layer in transformers -> its name in a file of that architecture."""
    gguf: Any = importlib.import_module("gguf")
    number = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names: dict[str, tuple[Any, str]] = gguf.get_tensor_name_map(number, layers).mapping
    return {stem: found for stem, (_, found) in names.items()}


def write_file(
    path: Path, architecture: str, entries: Mapping[str, Value], tensors: Sequence[Encoded]
) -> None:
    """Write the header, the entries, and one tensor after the other."""
    gguf: Any = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    add: Mapping[type, Callable[[str, Any], None]] = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for key, value in entries.items():
        add[type(value)](key, value)
    for one in tensors:
        kind = gguf.GGMLQuantizationType(int(one.kind))
        writer.add_tensor_info(one.name, one.shape, np.dtype("uint8"), one.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in tensors:
            writer.write_tensor_data(one.make().numpy())
    finally:
        writer.close()
