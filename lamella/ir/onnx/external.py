"""Data of a model that lies in files beside it, read without leaving the model's folder.

A model file names where its weights lie. The file is not trusted: a location must be a plain
relative path below the folder of the model, must not leave it through a symbolic link, and must
be a regular file that has no second name (a hard link could make any file of the disk look as
if it lay in the folder). The layout of the Hugging Face cache, where ``snapshots/<revision>/``
links into ``blobs/`` of the same repository, is let through.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from numpy.typing import NDArray

from lamella.errors import ModelFileError

Bytes = NDArray[np.uint8]


class ExternalFiles:
    """The files that a model may read: below its own folder, and nothing else.

    Attributes:
        folder: The folder of the model file, or None for a model that was given in memory
            without one; then every location is refused.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._maps: dict[Path, Bytes] = {}

    def read(self, location: str, offset: int, length: int, owner: str) -> Bytes:
        """The bytes ``offset:offset + length`` of a file, memory-mapped copy on write.

        Args:
            location: What the model says, relative to `folder`.
            offset: First byte.
            length: How many bytes.
            owner: The tensor that asks, for messages.

        Raises:
            ModelFileError: The location leaves the folder, or the file is missing, is not a
                plain file, or is too short.
        """
        mapped = self._map(location, owner)
        if offset < 0 or length < 0 or offset + length > len(mapped):
            raise ModelFileError(
                f"tensor {owner!r} lies at bytes {offset} to {offset + length} of {location!r}, "
                f"which has {len(mapped)} bytes: the file is truncated or the model lies"
            )
        return mapped[offset : offset + length]

    def _map(self, location: str, owner: str) -> Bytes:
        path = self._resolve(location, owner)
        if path not in self._maps:
            self._maps[path] = _open(path, location, owner)
        return self._maps[path]

    def _resolve(self, location: str, owner: str) -> Path:
        _check_spelling(location, owner)
        if self.folder is None:
            raise ModelFileError(
                f"tensor {owner!r} lies in the file {location!r}, but the model was given in "
                f"memory and has no folder; pass the path of the model file"
            )
        try:
            resolved = (self.folder / location).resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelFileError(
                f"tensor {owner!r} lies in {location!r}, which can't be found beside the model "
                f"({type(error).__name__})"
            ) from error
        if not any(resolved.is_relative_to(root) for root in _roots(self.folder)):
            raise ModelFileError(
                f"tensor {owner!r} lies in {location!r}, a link that leaves the folder of the "
                f"model; put a copy of the file into the folder"
            )
        return resolved


def _check_spelling(location: str, owner: str) -> None:
    windows, posix = PureWindowsPath(location), PurePosixPath(location)
    wrong = (
        not location
        or "\0" in location
        or "\\" in location
        or posix.is_absolute()
        or windows.drive != ""
        or ".." in posix.parts
    )
    if wrong:
        raise ModelFileError(
            f"tensor {owner!r} lies in {location!r}, expected a relative path below the folder "
            f"of the model without '..'"
        )


def _roots(folder: Path) -> list[Path]:
    """The folder, and the blobs of the same repository if it is a Hugging Face snapshot."""
    # Links are kept here: the snapshot, not the blobs, says where the repository is.
    absolute = folder.absolute()
    roots = [absolute.resolve()]
    parts = absolute.parts
    if "snapshots" in parts:
        place = len(parts) - 1 - parts[::-1].index("snapshots")
        repository = Path(*parts[:place])
        if (repository / "blobs").is_dir():
            roots.append((repository / "blobs").resolve())
    return roots


def _open(path: Path, location: str, owner: str) -> Bytes:
    """Map a file that was checked; looks at the open file, not at the name again."""
    # Without O_NONBLOCK the opening of a pipe would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise ModelFileError(f"tensor {owner!r} lies in {location!r}, not a regular file")
            if facts.st_nlink > 1:
                raise ModelFileError(
                    f"tensor {owner!r} lies in {location!r}, which has {facts.st_nlink} hard "
                    f"links, so that it may be any file of the disk; put a copy into the folder"
                )
            if facts.st_size == 0:
                return np.empty(0, np.uint8)
            # Copy on write: torch wants writable memory, and the file must stay as it is.
            return np.memmap(file, np.uint8, "c", shape=(facts.st_size,))
    except OSError as error:
        raise ModelFileError(
            f"tensor {owner!r} lies in {location!r}, which can't be opened "
            f"({type(error).__name__}: {error.strerror})"
        ) from error
