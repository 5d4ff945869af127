"""Measured figures on disk, for processes that come and go and don't wait for each other.

A store is a folder with a folder for every environment (machine, backend, threads, versions),
which holds JSON files. A writer reads the files that are there, writes all figures with its own
into a new file, and then removes the files that it has read: two writers at one time leave two
files and lose nothing, the next one makes one of them. Of two figures for one name the newer
counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lamella.caches import user_cache

FORMAT = 1
"""Version of the files."""

_LABEL = "environment"


@dataclass(frozen=True)
class Figure:
    """A measured time.

    Attributes:
        seconds: The median.
        at: When it was measured, in seconds since 1970.
    """

    seconds: float
    at: float


@dataclass(frozen=True)
class Contents:
    """What a store holds of one environment.

    Attributes:
        figures: Name -> figure.
        files: The files they were read from.
        corrupt: A sentence about each file that could not be read.
    """

    figures: Mapping[str, Figure]
    files: tuple[Path, ...]
    corrupt: tuple[str, ...]


def user_store() -> Path:
    """The folder for figures of this user."""
    return user_cache("kernels")


@dataclass(frozen=True)
class Store:
    """Figures of one environment in a folder.

    Attributes:
        folder: Of the store; made when something is written.
        environment: What the figures were measured in, in words.
    """

    folder: Path
    environment: str

    def read(self) -> Contents:
        """All figures; a file that can't be read is named and left out."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                return self._read()
            # Another process has put files together since they were listed.

    def write(self, figures: Mapping[str, float]) -> None:
        """Add figures; the folder holds either all of them afterwards, or what it held before.

        Raises:
            OSError: The disk is full, or the folder can't be written.
        """
        now = time.time()
        held = self.read()
        new = {name: Figure(seconds, now) for name, seconds in figures.items()}
        merged = {**held.figures, **new}
        data = {
            "format": FORMAT,
            _LABEL: self.environment,
            "figures": {name: [f.seconds, f.at] for name, f in sorted(merged.items())},
        }
        self._place.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=".figures-", dir=self._place)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(data, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            final = Path(aside)
            final.replace(final.with_name(f"{final.name[1:]}.json"))
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        for path in held.files:
            path.unlink(missing_ok=True)

    def others(self) -> tuple[str, ...]:
        """Other environments that the folder has figures of."""
        found: set[str] = set()
        for path in sorted(self.folder.glob("*/*.json")):
            if path.parent != self._place:
                with contextlib.suppress(OSError, ValueError):
                    found.add(_parsed(path)[0])
        return tuple(sorted(found))

    @property
    def _place(self) -> Path:
        digest = hashlib.sha256(self.environment.encode()).hexdigest()[:16]
        return self.folder / digest

    def _read(self) -> Contents:
        figures: dict[str, Figure] = {}
        corrupt: list[str] = []
        files = tuple(sorted(self._place.glob("*.json")))
        for path in files:
            try:
                _, found = _parsed(path)
            except ValueError as error:
                corrupt.append(
                    f"the file {str(path)!r} of measured times is corrupt ({error}) and was left "
                    f"out; its times are measured anew"
                )
                continue
            for name, figure in found.items():
                if name not in figures or figures[name].at < figure.at:
                    figures[name] = figure
        return Contents(figures, files, tuple(corrupt))


def _parsed(path: Path) -> tuple[str, dict[str, Figure]]:
    """The environment and the figures of a file.

    Raises:
        ValueError: It is corrupt, or of another format.
        OSError: It is gone, or can't be read.
    """
    data: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or cast(dict[str, Any], data).get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    try:
        pairs = data["figures"].items()
        figures = {str(name): Figure(float(seconds), float(at)) for name, (seconds, at) in pairs}
        environment = str(data[_LABEL])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not all(0 < figure.seconds < float("inf") for figure in figures.values()):
        raise ValueError("a time is not positive")
    return environment, figures
