"""Saved executables: a folder of files and a manifest that vouches for them.

The manifest is JSON: format version, backend, versions of the libraries, signature, recipe,
report, and the size and SHA-256 digest of every file, of the manifest too. A folder is written
aside, synced and renamed; it is read only after the digests were checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError

from lamella.backends.manifest import MANIFEST, read_manifest, write_manifest
from lamella.errors import ArtifactError, LamellaError

_SPARE_BYTES = 2**20
_LIBRARIES = ("lamella", "torch", "transformers", "onnx-ir", "onnxruntime", "onnxruntime-gpu")

_MALFORMED = (
    *(AttributeError, TypeError, ValueError, LookupError, StopIteration, StrictDataclassError),
)
"""What comes of data that has another form than its reader expects; the last is what configs of
transformers raise."""

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class FileEntry:
    """What the manifest promises of one file: its size and its SHA-256 digest in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Description:
    """What an executable says of itself in the manifest.

    Attributes:
        backend: Name of the backend that made it and can load it.
        signature: `Signature.to_json`.
        inputs: `InputSpec.to_json` of each flat input; `specs_from_json` reads them.
        recipe: The passes, as data.
        report: `Report.to_json`, or None.
        details: What the backend needs beside the files.
    """

    backend: str
    signature: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]] = ()
    recipe: Any = None
    report: Any = None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Artifact:
    """A folder whose manifest was read and whose files were checked."""

    folder: Path
    description: Description
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]


def save_artifact(
    folder: Path,
    description: Description,
    write: Callable[[Path], Mapping[str, Any]],
    needed_bytes: int,
) -> None:
    """Write a folder as a whole, or not at all.

    Args:
        folder: New, empty, or an older artifact, which is replaced.
        description: Goes into the manifest; its `details` are what `write` returns.
        write: Writes the files into an empty folder beside `folder`.
        needed_bytes: What `write` will write; checked against the free space first.

    Raises:
        ArtifactError: `folder` holds something that is not an artifact.
        OSError: The disk is full, or the place can't be written.
    """
    folder = folder.absolute()
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder.parent, needed_bytes)
    with _aside(folder, needed_bytes) as aside:
        details = write(aside)
        described = dataclasses.replace(description, details=details)
        manifest = _manifest_of(described, _entries(aside))
        write_manifest(aside / MANIFEST, manifest)
        _sync(aside)
        _put_in_place(aside, folder)


def open_artifact(folder: Path) -> Artifact:
    """Read the manifest of a folder and check every file against it.

    Raises:
        ArtifactError: The folder is missing, its manifest is corrupt or of another format, or
            a file is missing or differs from what the manifest says.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{str(folder)!r} is no saved executable: it has no {MANIFEST}; give the folder "
            f"that was passed to save"
        )
    manifest = read_manifest(path)
    try:
        artifact = _parse(folder, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{str(path)!r} is corrupt ({type(error).__name__}: {error}); save it again"
        ) from error
    for name, entry in artifact.files.items():
        _check_file(folder, name, entry)
    return artifact


def verify(folder: str | os.PathLike[str]) -> Artifact:
    """Check every byte of a folder that Lamella saved: an executable, or a checkpoint.

    Other runtimes load a checkpoint without looking at digests; this does, before they do.

    Args:
        folder: What was given to `save` or `save_checkpoint`, or a copy of it.

    Returns:
        What the manifest says of the folder.

    Raises:
        ArtifactError: A file is missing, or differs from what was saved; it is named.
    """
    return open_artifact(Path(folder))


def load_artifact(
    folder: str | Path, loaders: Mapping[str, Callable[[Artifact], Loaded]]
) -> Loaded:
    """Check a folder and hand it to the loader of its backend.

    Raises:
        ArtifactError: The folder is corrupt, its manifest describes something else than its
            files hold, or there is no loader for its backend.
    """
    artifact = open_artifact(Path(folder))
    loader = loaders.get(str(artifact.description.backend))
    if loader is None:
        raise ArtifactError(
            f"{str(folder)!r} was made for the backend {artifact.description.backend!r}, "
            f"known backends are {', '.join(sorted(loaders))}; install the package that has it"
        )
    try:
        return loader(artifact)
    except LamellaError as error:
        error.add_note(_made_with(artifact))
        raise
    except _MALFORMED as error:
        raise ArtifactError(
            f"the manifest of {str(folder)!r} does not describe what its files hold "
            f"({type(error).__name__}: {error}); save it again"
        ) from error


def _made_with(artifact: Artifact) -> str:
    """Which libraries were others when a folder was saved."""
    here = versions()
    other = [
        f"{name} {version} (here {here.get(name, 'none')})"
        for name, version in artifact.versions.items()
        if here.get(name) != version
    ]
    saved = f"{str(artifact.folder)!r} was saved with"
    return f"{saved} {', '.join(other)}" if other else f"{saved} the versions installed here"


def check_target(folder: Path) -> None:
    """Refuse a place that can't be saved to, before what is saved there is computed.

    Raises:
        ArtifactError: `folder` holds something else, or its place can't be written.
    """
    folder = folder.absolute()
    _refuse_foreign(folder)
    place = folder.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ArtifactError(
            f"{str(folder)!r} can't be written: {str(place)!r} is no folder, or you may not write "
            f"there; choose another place"
        )


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to write what will not fit.

    Raises:
        OSError: ``ENOSPC``, with both numbers in the message.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"not enough room for {needed_bytes:,} bytes ({free:,} bytes are free); free some "
            f"space or choose another folder",
            str(folder),
        )


def versions() -> dict[str, str]:
    """The installed versions of the libraries that matter to an executable."""
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or (folder / MANIFEST).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise ArtifactError(
            f"{str(folder)!r} exists and is no saved executable; give a new or an empty folder"
        )


@contextlib.contextmanager
def _aside(folder: Path, needed_bytes: int) -> Generator[Path]:
    """An empty folder beside `folder`, which is gone afterwards whatever happens."""
    aside = _beside(folder, "tmp")
    aside.mkdir()
    try:
        yield aside
    except OSError as error:
        free = shutil.disk_usage(folder.parent).free
        error.add_note(
            f"while saving {str(folder)!r}: {needed_bytes:,} bytes are needed, {free:,} are "
            f"free; nothing was changed"
        )
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _beside(folder: Path, suffix: str) -> Path:
    # Not `tempfile`: its folders are private, and a saved folder follows the umask.
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.{suffix}")


def _put_in_place(aside: Path, folder: Path) -> None:
    old: Path | None = None
    if folder.exists():
        # A folder can't be replaced in one step; a crash in between leaves both, by name.
        old = folder.rename(_beside(folder, "old"))
    try:
        aside.rename(folder)
    except OSError:
        if old is not None:
            old.rename(folder)
        raise
    _sync_folder(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _entries(folder: Path) -> dict[str, FileEntry]:
    entries: dict[str, FileEntry] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        entries[name] = FileEntry(path.stat().st_size, _digest(path))
    return entries


def _manifest_of(description: Description, files: Mapping[str, FileEntry]) -> dict[str, Any]:
    return {
        "versions": versions(),
        **dataclasses.asdict(description),
        "files": {name: dataclasses.asdict(entry) for name, entry in files.items()},
    }


def _parse(folder: Path, manifest: Mapping[str, Any]) -> Artifact:
    named = {item.name: manifest[item.name] for item in dataclasses.fields(Description)}
    files = {
        _safe_name(folder, name): FileEntry(int(entry["size"]), str(entry["sha256"]))
        for name, entry in manifest["files"].items()
    }
    return Artifact(folder, Description(**named), dict(manifest["versions"]), files)


def _safe_name(folder: Path, name: str) -> str:
    """`name`, if it stays below its folder on every system."""
    parts = PurePosixPath(name).parts
    windows = PureWindowsPath(name)
    if (
        not parts
        or ".." in parts
        or PurePosixPath(name).is_absolute()
        or windows.drive
        or "\\" in name
        or "\0" in name
    ):
        raise ArtifactError(
            f"the manifest of {str(folder)!r} names a file outside of its folder ({name!r})"
        )
    return name


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    if not path.is_file():
        raise ArtifactError(f"{str(path)!r} is missing; save it again")
    size = path.stat().st_size
    if size != entry.size:
        raise ArtifactError(
            f"{str(path)!r} has {size:,} bytes, the manifest says {entry.size:,}; save it again, "
            f"or copy it anew"
        )
    if _digest(path) != entry.sha256:
        raise ArtifactError(
            f"{str(path)!r} differs from what was saved (its digest is not the one in the "
            f"manifest); save it again, or copy it anew"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    # Only POSIX can open a folder; elsewhere a rename is durable by itself.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
