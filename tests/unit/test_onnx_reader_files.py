"""Files that are broken or lie: one clear error, and nothing read outside of the folder."""

from __future__ import annotations

import builtins
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lamella.errors import CaptureError, LamellaError, ModelFileError
from lamella.ir.onnx import read_onnx
from tests.unit.onnx_models import model, tensor_input

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)
SECRET = WEIGHT.tobytes()


def external(location: str, name: str = "w", **entries: str) -> TensorProto:
    """A float tensor ``[4, 3]`` whose data lies elsewhere."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4, 3])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def matmul() -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", "w"], ["y"])


def as_initializer(tensor: TensorProto) -> onnx.ModelProto:
    return model([matmul()], [tensor_input("x", ["n", 4])], ["y"], [tensor])


def as_constant(tensor: TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["w"], value=tensor)
    return model([node, matmul()], [tensor_input("x", ["n", 4])], ["y"])


def as_sparse_initializer(tensor: TensorProto) -> onnx.ModelProto:
    made = model([matmul()], [tensor_input("x", ["n", 4])], ["y"])
    indices = numpy_helper.from_array(np.arange(12, dtype=np.int64), "i")
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [4, 3]))
    return made


def as_sparse_constant(tensor: TensorProto) -> onnx.ModelProto:
    indices = numpy_helper.from_array(np.arange(12, dtype=np.int64), "i")
    sparse = helper.make_sparse_tensor(tensor, indices, [4, 3])
    node = helper.make_node("Constant", [], ["w"], sparse_value=sparse)
    return model([node, matmul()], [tensor_input("x", ["n", 4])], ["y"])


def in_branch(tensor: TensorProto) -> onnx.ModelProto:
    branch = helper.make_graph([matmul()], "b", [], [onnx.ValueInfoProto(name="y")], [tensor])
    node = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    condition = numpy_helper.from_array(np.array(True), "c")
    return model([node], [tensor_input("x", ["n", 4])], ["z"], [condition])


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    function = helper.make_function(
        "own", "F", ["x"], ["y"], [constant, matmul()], [helper.make_opsetid("", 21)]
    )
    node = helper.make_node("F", ["x"], ["y"], domain="own")
    return model([node], [tensor_input("x", ["n", 4])], ["y"], functions=[function])


PLACES = [
    as_initializer,
    as_constant,
    as_sparse_initializer,
    as_sparse_constant,
    in_branch,
    in_function,
]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder for the model, beside one with a file that must not be read."""
    inside, outside = tmp_path / "model", tmp_path / "outside"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_bytes(SECRET)
    (inside / "good").write_bytes(SECRET)
    (inside / "link").symlink_to(outside / "secret")
    (inside / "folder_link").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    os.link(outside / "secret", inside / "hard")
    os.mkfifo(inside / "pipe")
    return inside


LOCATIONS = [
    "../outside/secret",
    "sub/../../outside/secret",
    "sub/../good",
    "{outside}/secret",
    "link",
    "folder_link/secret",
    "loop",
    "hard",
    "pipe",
    "sub",
    "missing",
    "..\\outside\\secret",
    "C:\\secret",
    "C:secret",
    "\\\\host\\share",
    "good\0",
    "",
    ".",
]


@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("location", LOCATIONS, ids=repr)
def test_external_data_outside_of_the_folder_is_refused(folders, place, location, monkeypatch):
    outside = folders.parent / "outside"
    path = folders / "m.onnx"
    path.write_bytes(
        place(external(location.format(outside=outside), length="48")).SerializeToString()
    )
    opened: list[object] = []
    genuine = os.open
    monkeypatch.setattr(os, "open", lambda file, *a: opened.append(file) or genuine(file, *a))
    with pytest.raises(CaptureError):
        read_onnx(path)
    # A hard link can only be told from the open file; no byte of it is read.
    assert all(Path(str(file)).is_relative_to(folders) for file in opened)


@pytest.mark.parametrize("place", [as_initializer, as_constant, in_branch, in_function])
def test_external_data_in_the_folder_is_read(folders, place):
    path = folders / "m.onnx"
    path.write_bytes(place(external("good", length="48")).SerializeToString())
    x = torch.eye(4)
    assert read_onnx(path)(x) == {read_onnx(path).signature.outputs[0]: pytest.approx(WEIGHT)}


def test_external_weight_is_mapped_and_the_file_stays_as_it_is(folders):
    path = folders / "m.onnx"
    path.write_bytes(as_initializer(external("good", length="48")).SerializeToString())
    graph = read_onnx(path)
    weight = graph.weight("w")
    assert weight.shape == (3, 4)
    assert graph.origin.transposed == {"w"}
    weight.zero_()
    assert (folders / "good").read_bytes() == SECRET


def test_cache_of_the_hub_is_read(tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    proto = as_initializer(external("model.data", length="48"))
    (blobs / "1").write_bytes(proto.SerializeToString())
    (blobs / "2").write_bytes(SECRET)
    (snapshot / "model.onnx").symlink_to("../../../blobs/1")
    (snapshot / "model.data").symlink_to("../../../blobs/2")
    torch.testing.assert_close(
        read_onnx(snapshot / "model.onnx")(torch.eye(4))["y"], torch.from_numpy(WEIGHT)
    )
    other = tmp_path / "other"
    other.write_bytes(SECRET)
    (snapshot / "model.data").unlink()
    (snapshot / "model.data").symlink_to(other)
    with pytest.raises(ModelFileError, match="leaves the folder"):
        read_onnx(snapshot / "model.onnx")


@pytest.mark.parametrize(
    "entries",
    [
        {"length": "47"},
        {"length": "49"},
        {"offset": "1"},
        {"offset": "-48", "length": "48"},
        {"offset": "99999999999999999999"},
        {"offset": "one"},
        {"length": "-1"},
    ],
    ids=str,
)
def test_external_data_of_another_size_is_refused(folders, entries):
    path = folders / "m.onnx"
    path.write_bytes(as_initializer(external("good", **entries)).SerializeToString())
    with pytest.raises(ModelFileError):
        read_onnx(path)


def test_model_in_memory_has_no_folder(folders):
    with pytest.raises(ModelFileError, match="pass the path"):
        read_onnx(as_initializer(external("good")))


def test_model_of_onnx_ir_is_read_and_left_alone(folders):
    path = folders / "m.onnx"
    path.write_bytes(as_initializer(external("good", length="48")).SerializeToString())
    loaded = ir.load(path)
    assert read_onnx(loaded)(torch.eye(4))["y"].tolist() == WEIGHT.tolist()
    assert len(list(loaded.graph)) == 1
    (folders / "evil").symlink_to(folders.parent / "outside" / "secret")
    loaded.graph.initializers["w"].const_value = ir.ExternalTensor(
        "evil", 0, 48, ir.DataType.FLOAT, shape=ir.Shape([4, 3]), name="w", base_dir=str(folders)
    )
    with pytest.raises(ModelFileError, match="leaves the folder"):
        read_onnx(loaded)


def inline(dims: list[int], **fields: object) -> TensorProto:
    return TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, **fields)


@pytest.mark.parametrize(
    "tensor",
    [
        inline([4, 3], raw_data=SECRET[:-1]),
        inline([4, 3], raw_data=SECRET + b"\0"),
        inline([4, 3]),
        inline([4, 3], float_data=[1.0] * 11),
        inline([4, -3], raw_data=SECRET),
        inline([2**40, 2**40], raw_data=SECRET),
        inline([2**62, 4, 4], raw_data=SECRET),
        inline([0, 2**62, 2**62], raw_data=b""),
        inline([1] * 100, raw_data=SECRET[:4]),
        TensorProto(name="w", data_type=99, dims=[4, 3], raw_data=SECRET),
        TensorProto(name="w", data_type=TensorProto.STRING, dims=[1], string_data=[b"a"]),
    ],
    ids=range(11),
)
def test_tensor_that_lies_about_itself_is_refused(tensor):
    with pytest.raises(CaptureError):
        read_onnx(as_initializer(tensor))


GOOD = as_initializer(numpy_helper.from_array(WEIGHT, "w")).SerializeToString()


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"not a model", b"PK\x03\x04", b"\xff" * 100, b'{"format": "json"}', GOOD[:-9]],
    ids=range(7),
)
def test_file_that_is_no_model_is_refused(tmp_path, data):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match="onnx"):
        read_onnx(path)


def test_name_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(GOOD.replace(b"\x01x", b"\x01\xff"))
    with pytest.raises(ModelFileError, match="not text"):
        read_onnx(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="No such file"):
        read_onnx(tmp_path / "absent.onnx")
    with pytest.raises(ModelFileError, match="not a file"):
        read_onnx(tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_end_in_one_of_our_errors_or_in_a_graph(tmp_path, seed):
    draw = np.random.default_rng(seed)
    path = tmp_path / "m.onnx"
    refused = 0
    for _ in range(60):
        data = bytearray(GOOD)
        for place in draw.integers(0, len(data), 3):
            data[place] = draw.integers(0, 256)
        path.write_bytes(bytes(data[: draw.integers(len(data) // 2, len(data) + 1)]))
        try:
            read_onnx(path)
        except LamellaError:
            refused += 1
    # Damage inside of the weights can't be seen.
    assert refused > 20


def test_functions_that_unfold_without_end_are_refused():
    opset = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]

    def doubling(name: str, inner: str, domain: str) -> onnx.FunctionProto:
        nodes = [
            helper.make_node(inner, ["x"], ["m"], domain=domain),
            helper.make_node(inner, ["m"], ["y"], domain=domain),
        ]
        return helper.make_function("own", name, ["x"], ["y"], nodes, opset)

    bomb = [doubling("F0", "Relu", "")]
    bomb += [doubling(f"F{level}", f"F{level - 1}", "own") for level in range(1, 40)]
    call = helper.make_node("F39", ["x"], ["y"], domain="own")
    with pytest.raises(ModelFileError, match="unfolds to"):
        read_onnx(model([call], [tensor_input("x", ["n", 4])], ["y"], functions=bomb))
    loop = [doubling("F0", "F1", "own"), doubling("F1", "F0", "own")]
    call = helper.make_node("F0", ["x"], ["y"], domain="own")
    with pytest.raises(ModelFileError, match="calls itself"):
        read_onnx(model([call], [tensor_input("x", ["n", 4])], ["y"], functions=loop))


def test_names_never_become_code(tmp_path, monkeypatch):
    evil = 'w"); __import__("os").mkdir("pwned"); ("'
    monkeypatch.chdir(tmp_path)
    touched: list[str] = []
    monkeypatch.setattr(builtins, "eval", lambda *a: touched.append("eval"))
    name = 'x): __import__("os").mkdir("pwned")\n    def y('
    node = helper.make_node("MatMul", [name, evil], ["self"], name=evil)
    weight = numpy_helper.from_array(WEIGHT, evil)
    graph = read_onnx(model([node], [tensor_input(name, [evil, 4])], ["self"], [weight]))
    assert all(part.isidentifier() for part in graph.signature.inputs)
    graph(torch.eye(4))
    assert list(tmp_path.iterdir()) == []
    assert touched == []
