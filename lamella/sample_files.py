"""Samples from files: texts, or tensors saved as safetensors or npz."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from lamella.errors import SamplesError

_TENSORS = (".safetensors", ".npz")


def read_samples(path: Path) -> list[str] | list[Mapping[str, Any]]:
    """The samples in a file or a folder.

    Args:
        path: A text file (one text per line, empty lines are skipped), a ``.safetensors`` or
            ``.npz`` file (one batch of named inputs), or a folder of such files. In a folder
            every ``.txt`` file is one text; files are read in the order of their names.

    Raises:
        SamplesError: There are no samples, or texts and tensors are mixed.
        OSError: A file can't be read.
    """
    if not path.exists():
        raise SamplesError(f"there is no file or folder of samples {str(path)!r}")
    if path.is_dir():
        return _from_folder(path)
    if path.suffix in _TENSORS:
        return [_batch(path)]
    lines = _text(path).splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise SamplesError(f"{str(path)!r} holds no text; write one text per line")
    return texts


def _from_folder(folder: Path) -> list[str] | list[Mapping[str, Any]]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    texts = [path for path in files if path.suffix == ".txt"]
    batches = [path for path in files if path.suffix in _TENSORS]
    if texts and batches:
        raise SamplesError(
            f"{str(folder)!r} holds both texts and tensors; keep one kind of samples in a folder"
        )
    if not texts and not batches:
        raise SamplesError(f"{str(folder)!r} holds no .txt, .safetensors or .npz file")
    return [_text(path) for path in texts] if texts else [_batch(path) for path in batches]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SamplesError(
            f"{str(path)!r} is no text in UTF-8; samples are .txt, .safetensors or .npz files"
        ) from error


def _batch(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.as_tensor(arrays[name]) for name in arrays.files}
    except (SafetensorError, ValueError, EOFError, TypeError) as error:
        raise SamplesError(f"{str(path)!r} is corrupt ({error})") from error
