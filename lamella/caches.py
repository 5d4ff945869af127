"""Where this user keeps what can be made again."""

from __future__ import annotations

import sys
from pathlib import Path


def user_cache(kind: str) -> Path:
    """The folder for one kind of thing, where the system has such folders; it may not exist."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lamella" / kind
    if sys.platform == "win32":
        return Path.home() / "AppData" / "Local" / "lamella" / kind
    return Path.home() / ".cache" / "lamella" / kind
