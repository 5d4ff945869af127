"""Exported programs are read only when their file holds nothing but data."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from lamella.errors import ModelFileError
from lamella.ir.pt2_file import read_program


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": self.inner(x).flatten(0, 1)}


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.fixture
def saved(tmp_path) -> Path:
    x = torch.ones(2, 3, 4)
    shapes = {"x": {0: Dim.AUTO, 1: Dim.AUTO}}
    program = torch.export.export(Small(), (), {"x": x}, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "small.pt2")
    return tmp_path / "small.pt2"


def rewritten(path: Path, change) -> Path:
    """The archive with ``change(name, data)`` in place of each file; None leaves one out."""
    other = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return other


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_program_is_read(saved):
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert read_program(saved).module(check_guards=False)(x=x)["y"].shape == (15, 4)


def test_a_missing_or_corrupt_file_is_one_error(saved, tmp_path):
    with pytest.raises(ModelFileError, match="there is no file"):
        read_program(tmp_path / "nowhere.pt2")
    saved.write_bytes(saved.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match=r"torch\.export\.save"):
        read_program(saved)
    saved.write_text('{"model": 1}')
    with pytest.raises(ModelFileError, match=r"torch\.export\.save"):
        read_program(saved)


def test_pickled_sample_inputs_that_run_code_are_refused(saved):
    bad = rewritten(
        saved, lambda name, data: pickled(Payload()) if "sample_inputs" in name else data
    )
    with pytest.raises(ModelFileError, match="more than tensors"):
        read_program(bad)


def test_pickled_weights_that_run_code_are_refused(saved):
    def change(name: str, data: bytes) -> bytes:
        if name.endswith("model_weights_config.json"):
            config = json.loads(data)
            for payload in config["config"].values():
                payload["use_pickle"] = True
            return json.dumps(config).encode()
        return pickle.dumps(Payload()) if "weights/weight_" in name else data

    with pytest.raises(ModelFileError, match="more than tensors"):
        read_program(rewritten(saved, change))


def test_custom_objects_are_refused(saved):
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("model_weights_config.json"):
            return data
        config = json.loads(data)
        next(iter(config["config"].values()))["path_name"] = "opaque_obj_0"
        return json.dumps(config).encode()

    with pytest.raises(ModelFileError, match="pickled object"):
        read_program(rewritten(saved, change))


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "Symbol('s0').__class__",
        "eval('1')",
        "(lambda: 1)()",
        "Integer(1) if open('x') else 2",
    ],
)
def test_sizes_that_are_code_are_refused(saved, expression):
    def change(name: str, data: bytes) -> bytes:
        if "models/" not in name:
            return data
        text = json.dumps(json.loads(data))
        first = text.index('"expr_str": "') + len('"expr_str": "')
        last = text.index('"', first)
        return (text[:first] + expression + text[last:]).encode()

    with pytest.raises(ModelFileError, match="not arithmetic"):
        read_program(rewritten(saved, change))


def test_calls_of_anything_but_operators_are_refused(saved):
    def change(name: str, data: bytes) -> bytes:
        return data.replace(b"torch.ops.aten.linear.default", b"torch.os.system")

    with pytest.raises(ModelFileError, match=r"calls 'torch\.os\.system'"):
        read_program(rewritten(saved, change))


def test_machine_code_is_refused(saved):
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("small/data/aotinductor/model/wrapper.so", b"\x7fELF")
    with pytest.raises(ModelFileError, match="machine code"):
        read_program(saved)
