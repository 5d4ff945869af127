"""Saving and loading folders: whole or not at all, and nothing is trusted."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lamella.backends import artifact
from lamella.backends.artifact import (
    MANIFEST,
    Artifact,
    Description,
    load_artifact,
    open_artifact,
    save_artifact,
)
from lamella.backends.manifest import has_manifest, read_manifest, write_manifest
from lamella.errors import ArtifactError

DESCRIPTION = Description("toy", {"inputs": ["x"]}, recipe=["drop-blocks"], report={"loss": 0.1})
CONTENT = {"model.bin": b"weights", "sub/more.bin": b"\x00" * 100}


def write(folder: Path) -> Mapping[str, Any]:
    for name, data in CONTENT.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return {"opset": 23}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    save_artifact(folder, DESCRIPTION, write, 107)
    return folder


def loaders() -> dict[str, Any]:
    def loader(found: Artifact) -> Artifact:
        return found

    return {"toy": loader}


def edit_manifest(folder: Path, change: Any) -> None:
    """A manifest that says something else, and whose own digest is right."""
    manifest = read_manifest(folder / MANIFEST)
    change(manifest)
    write_manifest(folder / MANIFEST, manifest)


def test_what_was_saved_is_read_back(saved: Path):
    found = load_artifact(saved, loaders())
    assert found.description.details == {"opset": 23}
    assert found.description.recipe == ["drop-blocks"]
    assert found.description.report == {"loss": 0.1}
    assert {name: entry.size for name, entry in found.files.items()} == {
        "model.bin": 7,
        "sub/more.bin": 100,
    }
    assert {"lamella", "torch"} <= set(found.versions)


def test_nothing_but_the_folder_is_left(saved: Path):
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


def test_an_older_artifact_is_replaced_as_a_whole(saved: Path):
    def write_other(folder: Path) -> Mapping[str, Any]:
        (folder / "other.bin").write_bytes(b"1")
        return {}

    save_artifact(saved, DESCRIPTION, write_other, 1)
    assert sorted(path.name for path in saved.iterdir()) == [MANIFEST, "other.bin"]
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


def test_a_folder_with_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="is no saved executable; give a new or an empty"):
        save_artifact(tmp_path, DESCRIPTION, write, 107)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_save_leaves_the_old_artifact(saved: Path):
    def fail(folder: Path) -> Mapping[str, Any]:
        (folder / "half").write_bytes(b"1")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        save_artifact(saved, DESCRIPTION, fail, 5)
    assert caught.value.errno == errno.ENOSPC
    assert "5 bytes are needed" in caught.value.__notes__[0]
    assert [path.name for path in saved.parent.iterdir()] == ["out"]
    open_artifact(saved)


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"no.*room for 5,000,000 bytes \(1,000 bytes are free\)"):
        save_artifact(tmp_path / "out", DESCRIPTION, write, 5_000_000)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(saved: Path):
    (saved / "model.bin").unlink()
    with pytest.raises(ArtifactError, match=r"model\.bin' is missing"):
        open_artifact(saved)


def test_a_changed_file_is_named(saved: Path):
    (saved / "model.bin").write_bytes(b"WEIGHTS")
    with pytest.raises(ArtifactError, match=r"model\.bin' differs from what was saved"):
        open_artifact(saved)


def test_a_file_that_grew_is_named(saved: Path):
    with (saved / "model.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ArtifactError, match=r"model\.bin' has 11 bytes, the manifest says 7"):
        open_artifact(saved)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "sub/../../secret", "C:\\x", "C:x", "a\\b", "", "a\0b"]
)
def test_names_that_leave_the_folder_are_refused(saved: Path, name: str):
    entry = {"size": 1, "sha256": "0"}
    edit_manifest(saved, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(ArtifactError, match="outside of its folder"):
        open_artifact(saved)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 2}', '{"format": 2, "files": 3, "seal": "0"}']
)
def test_a_corrupt_manifest_is_one_error(saved: Path, text: str):
    (saved / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json' is corrupt"):
        open_artifact(saved)


def test_a_manifest_that_is_not_text_is_one_error(saved: Path):
    (saved / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match=r"manifest\.json' is corrupt"):
        open_artifact(saved)


def test_an_unknown_format_is_refused(saved: Path):
    edit_manifest(saved, lambda manifest: manifest.update(format=99))
    with pytest.raises(ArtifactError, match=r"has format 99, this .* reads format 2"):
        open_artifact(saved)


def test_any_byte_of_the_manifest_that_changed_is_seen(saved: Path):
    path = saved / MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert has_manifest(saved)
        with pytest.raises(ArtifactError, match=r"manifest\.json' is corrupt|has format"):
            open_artifact(saved)
    path.write_bytes(whole + b"\n")
    with pytest.raises(ArtifactError, match=r"manifest\.json' is corrupt"):
        open_artifact(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.update(files=3),
        lambda manifest: manifest["files"].update({"model.bin": {"size": "many"}}),
        lambda manifest: manifest.pop("backend"),
    ],
)
def test_a_manifest_that_describes_nothing_is_one_error(saved: Path, change: Any):
    edit_manifest(saved, change)
    with pytest.raises(ArtifactError, match=r"manifest\.json' is corrupt"):
        open_artifact(saved)


def test_a_manifest_of_another_program_is_not_ours(tmp_path: Path):
    assert not has_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text('{"name": "an app", "icons": []}')
    assert not has_manifest(tmp_path)


def test_an_unknown_backend_is_named(saved: Path):
    with pytest.raises(ArtifactError, match="made for the backend 'toy', known backends are other"):
        load_artifact(saved, {"other": lambda found: found})


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        open_artifact(tmp_path / "nothing")
