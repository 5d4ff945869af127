"""The manifest of a saved folder: JSON whose last entry is a digest of all that comes before it.

The manifest holds the digests of the other files; its own digest makes sure that no byte of the
folder can change unseen. The digest is no signature: who writes files can write manifests too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lamella.errors import ArtifactError

FORMAT = 2
"""Version of the layout of the folder; a reader refuses versions it doesn't know."""

MANIFEST = "manifest.json"
SEAL = "seal"
"""Name of the last entry."""

_LARGEST = 256 * 2**20
_END = b"\n}"
_MARKS = (b'"sha256"', b'"backend"', b'"seal"')


def write_manifest(path: Path, data: Mapping[str, Any]) -> None:
    """Write the format, `data`, and the digest of the text."""
    text = json.dumps({"format": FORMAT, **data}, indent=1, allow_nan=True).encode()
    body = text.removesuffix(_END)
    path.write_bytes(body + _sealing(body))


def read_manifest(path: Path) -> dict[str, Any]:
    """What was written, without the digest.

    Raises:
        ArtifactError: The file is no JSON, of another format, or differs from what was written.
    """
    if path.stat().st_size > _LARGEST:
        raise ArtifactError(f"{str(path)!r} is too large for a manifest; save the folder again")
    raw = path.read_bytes()
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{str(path)!r} is corrupt ({error}); save the folder again") from error
    if not isinstance(data, dict) or "format" not in data:
        raise ArtifactError(f"{str(path)!r} is corrupt (it has no format); save the folder again")
    found = cast(dict[str, Any], data)
    _check_format(path, found)
    body = raw[: len(raw) - len(_sealing(b""))]
    if raw != body + _sealing(body):
        raise ArtifactError(
            f"{str(path)!r} is corrupt (it differs from what was saved: its digest is not the one "
            f"at its end); save the folder again, or copy it anew"
        )
    return {name: value for name, value in found.items() if name != SEAL}


def has_manifest(folder: Path) -> bool:
    """Whether a folder was saved by Lamella, even when its manifest was damaged since.

    Other programs have files of that name too.
    """
    path = folder / MANIFEST
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return False
    raw = path.read_bytes()
    return any(mark in raw for mark in _MARKS)


def _check_format(path: Path, data: Mapping[str, Any]) -> None:
    versions: Any = data.get("versions")
    writer = versions.get("lamella") if isinstance(versions, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if data["format"] != FORMAT:
        raise ArtifactError(
            f"{str(path.parent)!r} has format {data['format']!r}, this version of lamella reads "
            f"format {FORMAT}; load it with lamella {writer}"
        )


def _sealing(body: bytes) -> bytes:
    """What follows `body`: the digest, and the end of the JSON."""
    return f',\n "{SEAL}": "{hashlib.sha256(body).hexdigest()}"'.encode() + _END
