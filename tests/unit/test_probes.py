"""Kernels are tried: right or wrong, fast or slow, once or again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import lamella
from lamella.backends.artifact import Artifact
from lamella.backends.base import Backend, Executable
from lamella.backends.dense import make_dense
from lamella.backends.formats import QuantFormat
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.torch.eager import EagerBackend, EagerExecutable
from lamella.backends.torch.held import UNPACKED
from lamella.errors import BackendError
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.report import Report
from lamella.tuning.layers import layer, sample
from lamella.tuning.offered import Offered, offered, used
from lamella.tuning.probes import Probe, Prober

EAGER = EagerBackend()
ROWS = next(one for one in EAGER.formats() if one.name == "int8-rows")
FLOATS = next(one for one in EAGER.formats() if one.name == "fp32")


@dataclass(frozen=True)
class Wrong(Backend):
    """Runs layers of integers without their scales, or not at all."""

    name: ClassVar[str] = "wrong"

    refuses: bool = False

    def formats(self) -> Sequence[QuantFormat]:
        return EAGER.formats()

    def unsupported(self, graph: Graph) -> dict[str, int]:
        return {}

    def lower(self, graph: Graph, report: Report | None = None) -> Executable:
        if self.refuses and "int8" in str(graph.nodes):
            raise BackendError("no kernel")
        twin = graph.copy()
        for node in twin.weight_nodes():
            if str(node.target) == "scales":
                twin.set_weight(node, torch.ones_like(twin.weight(node)))
        executable = EAGER.lower(twin, report)
        assert isinstance(executable, EagerExecutable)
        return executable

    def load(self, artifact: Artifact) -> Executable:
        return EAGER.load(artifact)


def test_what_was_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = Prober(EAGER, tmp_path).probes([ROWS])
    assert first.is_right
    assert 0 < first.seconds < 1
    assert 0 < first.dense_seconds < 1

    def again(*_: object) -> tuple[float, float, float]:
        return 1.0, 2.0, 3.0

    monkeypatch.setattr("lamella.tuning.probes._run", again)
    assert Prober(EAGER, tmp_path).probes([ROWS]) == (first,)
    (other,) = Prober(EAGER, tmp_path, again=True).probes([ROWS])
    assert (other.off, other.seconds, other.dense_seconds) == (1.0, 2.0, 3.0)
    # Another backend is another environment.
    (third,) = Prober(EagerBackend(bfloat16=True), tmp_path / "other").probes([ROWS])
    assert third.seconds == 2.0


def test_verdicts() -> None:
    good = Probe(ROWS, 1e-7, 1e-5, 2e-5)
    assert good.obstacle == ""
    assert replace(good, off=0.1).obstacle == "its results are off by 0.1, where 1e-05 is right"
    slow = replace(good, seconds=3e-5)
    assert slow.obstacle == "0.03 ms for a large layer, 0.02 ms without"
    assert replace(slow, format=FLOATS).obstacle == ""


def integer_graph() -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    graph = lamella.capture(model, (torch.randn(4, 64),))
    options = "bits=8 min_size=1 min_rows=0 activations=int8-rows"
    lamella.transform(graph, [f"quantize-weights {options}"])
    return graph


def planted(
    monkeypatch: pytest.MonkeyPatch, off: float = 1e-7, seconds: float = 1.0, dense: float = 2.0
) -> None:
    """Let every kernel be as wrong and as slow as that."""
    monkeypatch.setattr("lamella.tuning.probes._run", lambda *_: (off, seconds, dense))


def test_a_wrong_kernel_is_not_offered(tmp_path: Path) -> None:
    graph, x = integer_graph(), torch.randn(4, 64)
    assert used(graph, EAGER) == (ROWS,)
    found = offered(graph, Wrong(), tmp_path)
    (told,) = found.remarks
    assert told.startswith("a kernel is not offered on this machine: int8-rows (onednn")
    assert "its results are off by" in told
    assert told.endswith("2 layers have weights of floats instead, 0.0184 MB of them")
    assert not found.graph.find(lam.linear_int8.default)
    assert graph.find(lam.linear_int8.default)
    # The kernel forgets scales; without it results are those of the graph, up to the rounding of
    # two inputs to 8 bits, of which there is none now.
    got = found.backend.lower(found.graph)(x)
    assert float((got - graph(x)).norm() / graph(x).norm()) < 0.02


def test_strict_names_the_kernel(tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"not offered on this machine: int8-rows \(onednn"
    ) as it:
        offered(integer_graph(), Wrong(), tmp_path, strict=True)
    assert "slow_kernels" not in str(it.value)


def test_a_kernel_that_refuses_is_not_offered(tmp_path: Path) -> None:
    found = offered(integer_graph(), Wrong(refuses=True), tmp_path)
    assert "its results are off by 1e+30" in found.remarks[0]
    assert not found.graph.find(lam.linear_int8.default)


def test_a_slow_kernel_is_for_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, seconds=3.0)
    graph = integer_graph()
    found = offered(graph, OnnxRuntimeBackend(threads=1), tmp_path)
    assert "3e+03 ms for a large layer, 2e+03 ms without; 2 layers" in found.remarks[0]
    assert not found.graph.find(lam.linear_int8.default)
    with pytest.raises(BackendError, match=r"or these kernels with slow_kernels=True"):
        offered(graph, OnnxRuntimeBackend(threads=1), tmp_path, strict=True)
    asked = offered(graph, OnnxRuntimeBackend(threads=1, slow_kernels=True), tmp_path, strict=True)
    assert asked.graph is graph
    assert asked.remarks[0].startswith("used as asked: int8-rows")
    # Nobody gets a wrong one.
    planted(monkeypatch, off=0.5)
    wrong = OnnxRuntimeBackend(threads=1, slow_kernels=True)
    assert not offered(graph, wrong, tmp_path / "wrong").graph.find(lam.linear_int8.default)


def test_eager_has_another_exact_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, off=0.5)
    graph, x = integer_graph(), torch.randn(4, 64)
    found = offered(graph, EAGER, tmp_path)
    assert found.graph is graph
    assert found.backend == EagerBackend(integers="floats")
    assert found.remarks[0].endswith("its layers run without it, as exactly")
    executable = found.backend.lower(graph)
    assert isinstance(executable, EagerExecutable)
    assert executable.lowered.counts == {UNPACKED: 2}
    # Sums in another order.
    torch.testing.assert_close(executable(x), graph(x), rtol=1e-5, atol=1e-6)
    executable.save(tmp_path / "out")
    loaded = lamella.load(tmp_path / "out")
    assert isinstance(loaded, EagerExecutable)
    assert loaded.lowered.counts == {UNPACKED: 2}


@pytest.mark.parametrize(
    "name", ["4/32", "2/64z", "embedding 8/128", "int8-tensor", "int8-static", "convolution int8"]
)
def test_layers_of_floats_compute_the_same_but_for_rounded_inputs(name: str) -> None:
    backend = OnnxRuntimeBackend(threads=1)
    (format,) = [one for one in backend.formats() if str(one) == name]
    graph = layer(format, (48, 70))
    dense = graph.copy()
    (node,) = [n for n in dense.nodes if n.target is format.operator]
    assert make_dense(dense, node) == 48 * 70 * (9 if "conv" in name else 1) * (
        2 if "embedding" in name else 4
    )
    dense.finish()
    x = sample(format.role, (48, 70), 5)
    got, want = dense(x), graph(x)
    # A row is copied exactly; of products the inputs, and of convolutions the outputs, have 256
    # levels over a range of 8 deviations in the emulator.
    most = 0.0 if "embedding" in name else 0.03
    assert float((got - want).norm() / want.norm()) <= most
    torch.testing.assert_close(backend.lower(dense)(x), got, rtol=1e-4, atol=1e-4)


def test_a_graph_of_floats_needs_no_probe(tmp_path: Path) -> None:
    graph = lamella.capture(nn.Linear(8, 8).eval(), (torch.randn(4, 8),))
    assert offered(graph, EAGER, tmp_path) == Offered(graph, EAGER)
    assert list(tmp_path.iterdir()) == []


def test_compilation_goes_around_it_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    passes = ["quantize-weights bits=8 min_size=1 min_rows=0 activations=int8-rows"]
    x = torch.randn(4, 64)
    compiled = lamella.compile(model, (x,), passes=passes, backend=Wrong(), store=tmp_path)
    assert compiled.report is not None
    assert any("not offered on this machine" in remark for remark in compiled.report.remarks)
    # Weights of 8 bits.
    want = model(x).detach()
    assert float((compiled(x) - want).norm() / want.norm()) < 0.02
    with pytest.raises(BackendError, match="not offered on this machine"):
        lamella.compile(model, (x,), passes=passes, backend=Wrong(), store=tmp_path, strict=True)


def test_a_suspicion_is_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(3.0, 2.0), (1.0, 2.0)])
    monkeypatch.setattr("lamella.tuning.probes._medians", lambda _: next(times))
    seen: list[tuple[int, int]] = []
    prober = Prober(EAGER, tmp_path, progress=lambda *counts: seen.append(counts))
    (found,) = prober.probes([ROWS])
    assert (found.seconds, found.dense_seconds) == (1.0, 2.0)
    assert seen == [(0, 1)]


def test_a_folder_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    prober = Prober(EAGER, place)
    prober.probes([FLOATS])
    assert any("can't be kept" in problem for problem in prober.problems)
