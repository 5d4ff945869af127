"""The backend as users meet it: run, save, load, and every refusal."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.backends import artifact
from lamella.backends.artifact import load_artifact
from lamella.backends.manifest import read_manifest, write_manifest
from lamella.backends.onnxruntime import files, packages, threads
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.files import DATA, MODEL
from lamella.backends.onnxruntime.session import Session
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.errors import (
    ArtifactError,
    BackendError,
    GraphError,
    ProviderError,
    SamplesError,
    UnsupportedError,
)
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph

aten = torch.ops.aten

BACKEND = OnnxRuntimeBackend(threads=1)


class Net(nn.Module):
    """Two inputs of which one is a mask, and a dictionary as output."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Any]:
        hidden = self.down(torch.relu(self.up(x)))
        return {"out": torch.where(mask[..., None], hidden, x), "mask": ~mask, "none": None}


def graph_of(model: nn.Module, *, width: int = 8) -> Graph:
    graph = capture_module(model, inputs(2, 5, width))
    graph.finish()
    return graph


def inputs(batch: int, length: int, width: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, length, width, generator=generator)
    return {"x": x, "mask": x[..., 0] > 0}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    assert got["none"] is None
    assert torch.equal(got["mask"], want["mask"])
    # Sums of sixteen float32 products.
    torch.testing.assert_close(got["out"], want["out"], rtol=1e-5, atol=1e-6)


def test_an_executable_is_called_like_the_model(net: nn.Module):
    executable = BACKEND.lower(graph_of(net))
    for size in [(2, 5), (3, 7), (1, 1)]:
        given = inputs(*size)
        want = net(**given)
        assert_same(executable(**given), want)
        assert_same(executable(mask=given["mask"], x=given["x"]), want)


def test_results_survive_the_executable_and_the_inputs(net: nn.Module):
    executable = BACKEND.lower(graph_of(net))
    given = inputs(2, 5)
    want, got = net(**given), executable(**given)
    again = executable(**inputs(2, 5))
    given["x"].zero_()
    del executable
    gc.collect()
    assert_same(got, want)
    assert_same(again, want)


def test_inputs_may_be_views_and_may_want_gradients(net: nn.Module):
    executable = BACKEND.lower(graph_of(net))
    wide = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    given = {"x": wide.transpose(1, 2), "mask": torch.ones(5, 2, dtype=torch.bool).t()}
    assert_same(executable(**given), net(**given))


def test_a_saved_executable_is_loaded(net: nn.Module, tmp_path: Path):
    executable = BACKEND.lower(graph_of(net))
    executable.recipe = ["fold-norms"]
    executable.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", MODEL]
    loaded = load_artifact(tmp_path / "out", {"onnxruntime": BACKEND.load})
    given = inputs(3, 4)
    assert_same(loaded(**given), net(**given))
    assert loaded.weight_bytes == executable.weight_bytes >= 4 * (16 * 8 * 2 + 24)
    assert loaded.file_bytes == executable.file_bytes == (tmp_path / "out" / MODEL).stat().st_size
    # What was loaded can be saved again, also over itself.
    loaded.save(tmp_path / "out")
    loaded.save(tmp_path / "other")
    third = load_artifact(tmp_path / "other", {"onnxruntime": BACKEND.load})
    assert_same(third(**given), net(**given))


def test_large_weights_lie_in_a_file_of_their_own(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "_ONE_FILE_BYTES", 1000)
    monkeypatch.setattr(files, "_SMALL_TENSOR_BYTES", 100)
    executable = BACKEND.lower(graph_of(net))
    executable.save(tmp_path / "out")
    assert (tmp_path / "out" / DATA).stat().st_size >= 2 * 4 * 16 * 8
    loaded = load_artifact(tmp_path / "out", {"onnxruntime": BACKEND.load})
    given = inputs(3, 4)
    assert_same(loaded(**given), net(**given))
    data = (tmp_path / "out" / DATA).read_bytes()
    (tmp_path / "out" / DATA).write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=rf"{DATA}' has .* bytes, the manifest says"):
        load_artifact(tmp_path / "out", {"onnxruntime": BACKEND.load})


def test_a_manifest_without_details_is_refused(net: nn.Module, tmp_path: Path):
    BACKEND.lower(graph_of(net)).save(tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = read_manifest(path)
    del manifest["details"]["outputs"]
    write_manifest(path, manifest)
    with pytest.raises(ArtifactError, match="does not describe an ONNX model"):
        load_artifact(tmp_path / "out", {"onnxruntime": BACKEND.load})


def test_temporary_files_go_with_the_executable(net: nn.Module, tmp_path: Path):
    executable = OnnxRuntimeBackend(threads=1, scratch=tmp_path).lower(graph_of(net))
    assert len(list(tmp_path.iterdir())) == 1
    del executable
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 8, dtype=torch.float64)}, "input 'x' is float64"),
        ({"x": torch.zeros(2, 5, 9)}, r"input 'x' has shape \[2, 5, 9\]"),
        ({"x": torch.zeros(2, 8)}, r"input 'x' has shape \[2, 8\]"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "input 'mask' has size 4 where 'x' has 5"),
        ({"mask": [1, 2]}, "'mask'|2 tensors|3 tensors"),
    ],
)
def test_inputs_that_do_not_fit_are_named(net: nn.Module, change: dict[str, Any], message: str):
    executable = BACKEND.lower(graph_of(net))
    with pytest.raises(SamplesError, match=message):
        executable(**{**inputs(2, 5), **change})


class Odd(nn.Module):
    """Operators that have no emitter."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.lgamma(x) + torch.erfinv(x) + torch.lgamma(x + 1)


def test_a_model_in_bfloat16_is_refused_with_what_to_do():
    model = Net().eval().to(torch.bfloat16)
    given = inputs(2, 5)
    graph = capture_module(model, {**given, "x": given["x"].to(torch.bfloat16)})
    with pytest.raises(BackendError, match=r"bfloat16 .* convert it with model\.float\(\)"):
        BACKEND.lower(graph)


def test_a_model_in_float16_runs():
    model = Net().eval().to(torch.float16)
    given = inputs(2, 5)
    given["x"] = given["x"].to(torch.float16)
    got = BACKEND.lower(capture_module(model, given))(**given)
    # float16 has eleven bits.
    torch.testing.assert_close(got["out"], model(**given)["out"], rtol=0, atol=4e-3)


def test_every_operator_without_an_emitter_is_listed_at_once():
    graph = capture_module(Odd(), {"x": torch.rand(2, 3)})
    assert BACKEND.unsupported(graph) == {"aten.lgamma.default": 2, "aten.erfinv.default": 1}
    message = r"can't lower aten\.lgamma\.default \(x2\), aten\.erfinv\.default \(x1\)"
    with pytest.raises(UnsupportedError, match=message):
        BACKEND.lower(graph)
    with pytest.raises(UnsupportedError, match=r"lgamma\.default \(x2\), aten\.erfinv"):
        write_onnx(graph)


def test_a_weight_without_data_is_named():
    graph = graph_of(Net().eval())
    node = graph.weight_node("up.weight")
    graph.set_weight(node, torch.empty(16, 8, device="meta"))
    with pytest.raises(GraphError, match=r"weight 'up\.weight' has no data"):
        BACKEND.lower(graph)


def test_a_model_that_onnxruntime_refuses_is_one_error(tmp_path: Path):
    (tmp_path / MODEL).write_bytes(b"not a model")
    with pytest.raises(BackendError, match=r"onnxruntime .* refuses the model"):
        Session(tmp_path / MODEL)


def test_a_full_disk_is_one_error(net: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    graph = graph_of(net)
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"\(10 bytes are free\)") as caught:
        OnnxRuntimeBackend(threads=1, scratch=tmp_path).lower(graph)
    assert caught.value.errno == errno.ENOSPC
    del caught
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_provider_names_what_there_is(net: nn.Module):
    backend = OnnxRuntimeBackend(provider="NoSuchExecutionProvider")
    with pytest.raises(ProviderError, match=r"has no provider 'NoSuch.* it has .*CPUExecution"):
        backend.lower(graph_of(net))


def test_a_provider_that_does_not_load_is_an_error(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """ONNX Runtime itself goes on with the CPU when a library of CUDA is missing."""
    ort = packages.import_onnxruntime()
    BACKEND.lower(graph_of(net)).save(tmp_path / "out")
    known = ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def fall_back(path: str, options: Any, providers: list[str]) -> Any:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    broken = SimpleNamespace(
        __version__=ort.__version__,
        SessionOptions=ort.SessionOptions,
        InferenceSession=fall_back,
        get_available_providers=lambda: known,
        capi=ort.capi,
    )
    monkeypatch.setattr("lamella.backends.onnxruntime.session.import_onnxruntime", lambda: broken)
    with pytest.raises(ProviderError, match=r"fell back to CPU.*CUDA.* did not load"):
        Session(tmp_path / "out" / MODEL, provider="CUDAExecutionProvider")


def test_two_packages_at_once_are_refused_with_the_command(monkeypatch: pytest.MonkeyPatch):
    both = ("onnxruntime", "onnxruntime-gpu")
    monkeypatch.setattr(packages, "installed_flavors", lambda: both)
    command = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    with pytest.raises(ProviderError, match=command):
        BACKEND.ensure_available()


def test_a_missing_package_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "installed_flavors", tuple)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r'pip install "lamella\[cpu\]"'):
        BACKEND.ensure_available()


def test_threads_are_the_physical_cores_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for cpu, core in enumerate([0, 0, 1, 1]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(f"{core}\n")
        (folder / "physical_package_id").write_text("0\n")
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(threads, "_CGROUP", tmp_path / "none")
    monkeypatch.setattr(threads, "_allowed_cpus", lambda: {0, 1, 2, 3})
    assert threads.physical_cores() == 2
    assert threads.worker_cpus(2) == (2,)
    monkeypatch.setattr(threads, "_allowed_cpus", lambda: {0, 1})
    assert threads.physical_cores() == 1
    assert not threads.worker_cpus(1)
    monkeypatch.setattr(threads, "_allowed_cpus", lambda: {7, 8, 9})
    assert threads.physical_cores() == 3
    assert threads.worker_cpus(3) == (8, 9)
    # With cores to spare the system chooses.
    assert not threads.worker_cpus(2)
    quota = tmp_path / "cpu.max"
    quota.write_text("150000 100000\n")
    monkeypatch.setattr(threads, "_CGROUP", quota)
    assert threads.physical_cores() == 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="CPUs are chosen on Linux only")
def test_every_worker_has_a_core_of_its_own(net: nn.Module, tmp_path: Path):
    BACKEND.lower(graph_of(net)).save(tmp_path / "out")
    before = {path.name for path in Path("/proc/self/task").iterdir()}
    cores = threads.physical_cores()
    session = Session(tmp_path / "out" / MODEL, threads=cores)
    made = {path.name for path in Path("/proc/self/task").iterdir()} - before
    wanted = [{cpu} for cpu in threads.worker_cpus(cores)]
    assert session.threads == cores
    # A thread goes to its core when it starts to run.
    stop = time.monotonic() + 10
    while places_of(made) != wanted and time.monotonic() < stop:
        time.sleep(0.01)
    assert not wanted or places_of(made) == wanted


def places_of(tasks: set[str]) -> list[set[int]]:
    return sorted((os.sched_getaffinity(int(task)) for task in tasks), key=min)


@pytest.mark.parametrize("opset", [20, 24])
def test_an_opset_out_of_range_is_refused(net: nn.Module, opset: int):
    with pytest.raises(ValueError, match=f"opset must be 21, 22 or 23, got {opset}"):
        write_onnx(graph_of(net), opset=opset)


def test_names_of_inputs_and_outputs_are_those_of_the_signature(net: nn.Module):
    model = write_onnx(graph_of(net))
    assert [value.name for value in model.graph.inputs] == ["x", "mask"]
    assert [value.name for value in model.graph.outputs] == ["out", "mask.out"]
    shapes = [str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]
    sizes = "batch,sequence"
    assert shapes == [f"[{sizes},8]", f"[{sizes}]", f"[{sizes},8]", f"[{sizes}]"]
    assert {"up.weight", "up.bias", "down.weight", "down.bias"} <= set(model.graph.initializers)


def test_writing_leaves_the_graph_as_it_was(net: nn.Module):
    graph = graph_of(net)
    before, text = graph.edits, str(graph)
    write_onnx(graph)
    assert (graph.edits, str(graph)) == (before, text)


def test_a_failure_names_the_node_and_the_operator():
    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return aten.avg_pool2d(x, [2], [2], [0], False, True, 3)

    graph = capture_module(Pool(), {"x": torch.rand(2, 3, 4, 4)})
    message = r"node avg_pool2d \(aten\.avg_pool2d\.default\) can't be written to ONNX: average"
    with pytest.raises(BackendError, match=message):
        write_onnx(graph)
