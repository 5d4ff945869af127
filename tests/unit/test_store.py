"""Measured times on disk: read back, corrupt files, two writers, other environments."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from lamella.tuning.store import Store, user_store

HERE = "some processor, 2 cores; onnxruntime, 2 threads; onnxruntime 1.0; table 1"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _seconds(store: Store) -> dict[str, float]:
    return {name: figure.seconds for name, figure in store.read().figures.items()}


def test_figures_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "new", HERE)
    assert _seconds(store) == {}
    store.write({"one": 1e-6, "two": 2.5e-3})
    store.write({"two": 3e-3, "three": 1.0})
    assert _seconds(Store(tmp_path / "new", HERE)) == {"one": 1e-6, "two": 3e-3, "three": 1.0}
    # What was read is put together: files do not pile up, and nothing lies aside.
    (file,) = _files(tmp_path)
    assert json.loads(file.read_text())["environment"] == HERE


@pytest.mark.parametrize(
    "other",
    [
        HERE.replace("onnxruntime 1.0", "onnxruntime 1.1"),
        HERE.replace("some", "another"),
        HERE.replace("2 threads", "1 threads"),
        HERE.replace("table 1", "table 2"),
    ],
)
def test_figures_of_another_environment_are_not_given(tmp_path: Path, other: str) -> None:
    Store(tmp_path, HERE).write({"one": 1e-6})
    store = Store(tmp_path, other)
    assert _seconds(store) == {}
    assert store.others() == (HERE,)
    store.write({"one": 2e-6})
    assert _seconds(Store(tmp_path, HERE)) == {"one": 1e-6}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 7, "environment": "x", "figures": {}}',
        '{"format": 1, "figures": {}}',
        '{"format": 1, "environment": "x", "figures": {"one": 3}}',
        '{"format": 1, "environment": "x", "figures": {"one": [-1, 0]}}',
        '{"format": 1, "environment": "x", "figures": {"one": ["NaN", 0]}}',
        "\x00\x01",
    ],
)
def test_a_corrupt_file_is_named_and_the_others_are_read(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path, HERE)
    store.write({"one": 1e-6})
    (good,) = _files(tmp_path)
    bad = good.with_name("figures-bad.json")
    bad.write_text(text)
    held = store.read()
    assert set(held.figures) == {"one"}
    (problem,) = held.corrupt
    assert str(bad) in problem
    assert "measured anew" in problem
    store.write({"two": 2e-6})
    assert _seconds(store) == {"one": 1e-6, "two": 2e-6}
    assert store.read().corrupt == ()


def test_the_newer_of_two_figures_counts(tmp_path: Path) -> None:
    store = Store(tmp_path, HERE)
    store.write({"one": 1e-6})
    (file,) = _files(tmp_path)
    older = json.loads(file.read_text())
    older["figures"] = {"one": [5e-6, 1.0], "two": [2e-6, 1.0]}
    # Read after the other, whatever their names are.
    file.with_name("figures-zzz.json").write_text(json.dumps(older))
    assert _seconds(store) == {"one": 1e-6, "two": 2e-6}


def _write_many(folder: str, first: int) -> None:
    store = Store(Path(folder), HERE)
    for number in range(first, first + 20):
        store.write({f"kernel {number}": number * 1e-6})


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(str(tmp_path), n)) for n in (1, 101)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = _seconds(Store(tmp_path, HERE))
    expected = {f"kernel {n}": n * 1e-6 for first in (1, 101) for n in range(first, first + 20)}
    assert found == expected


def test_what_fails_to_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, HERE)
    store.write({"one": 1e-6})

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        store.write({"two": 2e-6})
    assert len(_files(tmp_path)) == 1
    assert _seconds(store) == {"one": 1e-6}


def test_no_variable_of_ours_moves_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    before = user_store()
    monkeypatch.setenv("LAMELLA_STORE", "/elsewhere")
    monkeypatch.setenv("LAMELLA_CACHE", "/elsewhere")
    assert user_store() == before
    assert before.name == "kernels"
