"""Samples from text files, tensor files and folders of them."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch

from lamella.errors import SamplesError
from lamella.sample_files import read_samples


def test_a_text_file_holds_a_text_per_line(tmp_path):
    (tmp_path / "texts.txt").write_text("one\n\n  two  \n")
    assert read_samples(tmp_path / "texts.txt") == ["one", "two"]


def test_a_folder_holds_a_text_or_a_batch_per_file(tmp_path):
    (tmp_path / "b.txt").write_text("second\nstill second")
    (tmp_path / "a.txt").write_text("first")
    assert read_samples(tmp_path) == ["first", "second\nstill second"]
    tensors = tmp_path / "tensors"
    tensors.mkdir()
    safetensors.torch.save_file({"x": torch.ones(2)}, tensors / "1.safetensors")
    np.savez(tensors / "2.npz", x=np.zeros(3))
    first, second = read_samples(tensors)
    assert torch.equal(first["x"], torch.ones(2))
    assert second["x"].shape == (3,)
    (tensors / "3.txt").write_text("text")
    with pytest.raises(SamplesError, match="both texts and tensors"):
        read_samples(tensors)


def test_what_holds_no_samples_is_refused(tmp_path):
    with pytest.raises(SamplesError, match="there is no file or folder"):
        read_samples(tmp_path / "nowhere")
    with pytest.raises(SamplesError, match="holds no"):
        read_samples(tmp_path)
    for name, data, message in (
        ("empty.txt", b"\n", "holds no text"),
        ("bytes.txt", b"\xff\xfe\x00", "UTF-8"),
        ("cut.safetensors", b"\x01", "corrupt"),
        ("cut.npz", b"PK", "corrupt"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SamplesError, match=message):
            read_samples(tmp_path / name)


def test_pickled_arrays_are_not_read(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    with pytest.raises(SamplesError, match="corrupt"):
        read_samples(tmp_path / "objects.npz")
