"""Finished blocks of a chain on disk, so that a run that was killed goes on where it was.

A folder holds a safetensors file for every block and run. A run is known by everything that
its result hangs on: the weights, the structure of the graph, the samples, the options and the
versions. A file is written aside, synced and renamed, and holds a digest of its contents: a
file that is not whole is never used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lamella.errors import PassError
from lamella.ir.graph import Graph

FORMAT = 1
"""Version of the files; part of the key."""

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class BlockFiles:
    """The files of one run in a folder.

    Attributes:
        folder: Where; `prepare` makes it.
        key: Digest of everything the result hangs on.
    """

    folder: Path
    key: str

    def prepare(self) -> None:
        """Make the folder, before anything that takes long.

        Raises:
            PassError: There is a file in its place.
            OSError: It can't be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise PassError(
                f"blocks can't be kept in {str(self.folder)!r}, there is a file in its place; "
                f"name a folder with resume="
            ) from error

    def read(self, index: int) -> tuple[dict[str, Tensor] | None, str | None]:
        """The tensors of a block, or why there are none; both None if there is no file."""
        path = self.path(index)
        if not path.is_file():
            return None, None
        try:
            with safe_open(path, framework="pt") as file:
                said: dict[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            return None, f"{path.name} can't be read ({error})"
        if said != self._label(index, tensors):
            return None, f"{path.name} does not hold what was written into it"
        return tensors, None

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a block; the folder holds either the whole file afterwards, or none.

        Raises:
            OSError: The disk is full, or the folder can't be written.
        """
        whole = {name: value.contiguous() for name, value in tensors.items()}
        data = save(whole, self._label(index, whole))
        path = self.path(index)
        aside = path.with_suffix(".part")
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync_folder(self.folder)

    def path(self, index: int) -> Path:
        """The file of a block."""
        return self.folder / f"block-{index:04d}-{self.key[:16]}{_SUFFIX}"

    def _label(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        return {"key": self.key, "block": str(index), "digest": _digest(tensors)}

    def others(self) -> tuple[str, ...]:
        """Files of other runs."""
        ours = f"-{self.key[:16]}{_SUFFIX}"
        found = self.folder.glob(f"block-*{_SUFFIX}")
        return tuple(sorted(path.name for path in found if not path.name.endswith(ours)))


def run_key(graph: Graph, samples_digest: str, options: Mapping[str, Any]) -> str:
    """The digest of everything that the result of a chain hangs on.

    Args:
        graph: Its weights are read one by one, and its structure as text.
        samples_digest: Of the samples.
        options: Plain data.
    """
    sha = hashlib.sha256()
    versions = [FORMAT, metadata.version("lamella"), torch.__version__]
    sha.update(json.dumps([versions, samples_digest, options], sort_keys=True).encode())
    for node in graph.nodes:
        sha.update(f"{node.op}|{node.name}|{node.target}|{node.args}|{node.kwargs}\n".encode())
    weights = {str(node.target): node for node in graph.weight_nodes()}
    sha.update(_digest((name, graph.weight(weights[name])) for name in sorted(weights)).encode())
    return sha.hexdigest()


def _digest(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    sha = hashlib.sha256()
    pairs = sorted(tensors.items()) if isinstance(tensors, Mapping) else tensors
    for name, value in pairs:
        sha.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        if value.numel():
            flat = value.detach().cpu().contiguous().reshape(-1)
            sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _sync_folder(folder: Path) -> None:
    # Only POSIX can open a folder; elsewhere a rename is durable by itself.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
