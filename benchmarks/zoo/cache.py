"""Where trained models are kept, and under which key."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2] / ".cache" / "zoo"


def cached(name: str, key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder of a trained model; `build` fills it if it is not there.

    Args:
        name: A word for people.
        key: Everything that the result depends on; its digest is part of the folder's name.
        build: Writes the files into the folder that it is given.

    Returns:
        A complete folder: it is filled aside and renamed, so an interrupted training leaves none.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = ROOT / f"{name}-{digest}"
    if folder.exists():
        return folder
    ROOT.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=ROOT))
    try:
        build(aside)
        (aside / "key.json").write_text(json.dumps(dict(key), indent=1, sort_keys=True))
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
