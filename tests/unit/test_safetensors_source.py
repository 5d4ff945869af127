"""Reading weights from safetensors: headers that lie, and weights that stay in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lamella.errors import ModelFileError
from lamella.ir.safetensors_file import read_header
from lamella.ir.safetensors_source import Place, SafetensorsSource


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(5, 3, generator=generator),
        "b": torch.randn(7, generator=generator).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def with_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a file, as a liar would."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_the_header_says_what_the_tensors_are(path: Path):
    entries = read_header(path)
    for name, value in tensors().items():
        assert entries[name].dtype == value.dtype
        assert entries[name].shape == tuple(value.shape)
        assert entries[name].stop - entries[name].start == value.numel() * value.element_size()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h["a"].update(shape=[5, 4]), "needs 80 bytes and claims 60"),
        (lambda h: h["a"].update(dtype="F99"), "unknown type 'F99'"),
        (lambda h: h["a"].update(shape=[-5, -3]), "no valid shape"),
        (lambda h: h["a"].update(data_offsets=[0]), "no valid shape"),
        (lambda h: h["a"].update(data_offsets="0"), "no valid shape"),
        (lambda h: h.update(a=3), "unknown type None"),
        (lambda h: h.update(c={**h["a"]}), "overlap"),
        (lambda h: h.pop("a"), "unclaimed bytes|need .* bytes"),
    ],
)
def test_a_header_that_lies_is_named(
    path: Path, edit: Callable[[dict[str, Any]], None], message: str
):
    with_header(path, edit)
    with pytest.raises(ModelFileError, match=rf"x\.safetensors.*({message})"):
        read_header(path)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_named(path: Path, kept: int):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelFileError, match=r"x\.safetensors.*truncated or corrupt"):
        read_header(path)


def test_a_header_longer_than_the_file_is_not_read(path: Path):
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ModelFileError, match="should have 1152921504606846976 bytes"):
        read_header(path)


@pytest.mark.parametrize("text", [b"[1, 2]", b"{oops", b"\xff\xfe"])
def test_a_header_that_is_no_mapping_is_named(tmp_path: Path, text: bytes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ModelFileError, match="header is no"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ModelFileError, match=r"none\.safetensors.*can't be read"):
        read_header(tmp_path / "none.safetensors")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damage_of_the_header_gets_past_the_check_unseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    """A changed byte either is an error of ours or leaves all tensors within the file."""
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save_file(tensors(), path)
    raw = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    try:
        entries = read_header(path)
    except ModelFileError:
        return
    length = int.from_bytes(raw[:8], "little")
    assert all(8 + length + entry.stop <= len(raw) for entry in entries.values())


def test_tensors_are_read_whole_or_by_rows(path: Path):
    source = SafetensorsSource.of_files(path)
    assert source.names() == frozenset(tensors())
    for name, value in tensors().items():
        assert torch.equal(source.read(name), value)
    assert torch.equal(source.read_rows("a", 1, 3), tensors()["a"][1:3])
    with pytest.raises(ModelFileError, match="no weight 'A'"):
        source.read("A")


def test_weights_are_given_in_the_dtype_of_the_graph(path: Path):
    source = SafetensorsSource({"w": Place(path, "b", torch.float32, (7,))})
    assert torch.equal(source.read("w"), tensors()["b"].float())


def test_a_file_that_changed_since_the_capture_is_named(path: Path):
    source = SafetensorsSource.of_files(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ModelFileError, match=r"no longer holds 'a'"):
        source.read("a")
