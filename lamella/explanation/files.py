"""Files of explanations: written aside and put in place at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lamella.errors import closest
from lamella.explanation import plots


def check(path: str | os.PathLike[str], kinds: Collection[str]) -> str:
    """The ending of `path`, after a check that such a file can be written there.

    Raises:
        ValueError: `kinds` has no such ending.
        FileNotFoundError: There is no such folder.
        BackendError: What draws pictures is not installed.
    """
    place = Path(path)
    ending = place.suffix.lower()
    if ending not in kinds:
        raise ValueError(
            f"can't tell from {str(place)!r} what to write{closest(ending, kinds)}; a file ends "
            f"with {', '.join(kinds)}"
        )
    if not place.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(place.parent)!r} to write into")
    if ending == ".png":
        plots.check_installed()
    return ending


def write(path: str | os.PathLike[str], kinds: Mapping[str, Callable[[], bytes]]) -> None:
    """Write the kind of file that the ending of `path` says.

    Args:
        path: Of the file; an old one is replaced.
        kinds: Ending -> what makes the content.

    Raises:
        ValueError: There is no such kind.
        FileNotFoundError: There is no such folder.
    """
    content = kinds[check(path, kinds)]()
    place = Path(path)
    aside = place.with_name(f".{place.name}.part")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(place)
    finally:
        aside.unlink(missing_ok=True)


def as_json(data: Mapping[str, Any]) -> bytes:
    """`data` as text."""
    return (json.dumps(data, indent=2) + "\n").encode()
