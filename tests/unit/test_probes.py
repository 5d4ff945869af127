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
from lamella.backends.formats import QuantFormat
from lamella.backends.torch.eager import EagerBackend, EagerExecutable
from lamella.errors import BackendError
from lamella.ir.graph import Graph
from lamella.report import Report
from lamella.tuning.probes import Probe, Prober, used, warnings_of

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


def test_a_wrong_kernel_is_named(tmp_path: Path) -> None:
    graph = integer_graph()
    assert used(graph, EAGER) == (ROWS,)
    (told,) = warnings_of(graph, Wrong(), tmp_path / "wrong")
    assert told.startswith("kernels that failed their probe on this machine: int8-rows (onednn")
    assert "its results are off by" in told


def test_a_kernel_that_refuses_is_named(tmp_path: Path) -> None:
    (told,) = warnings_of(integer_graph(), Wrong(refuses=True), tmp_path)
    assert "its results are off by 1e+30" in told


def test_a_graph_of_floats_needs_no_probe(tmp_path: Path) -> None:
    graph = lamella.capture(nn.Linear(8, 8).eval(), (torch.randn(4, 8),))
    assert warnings_of(graph, EAGER, tmp_path) == ()
    assert list(tmp_path.iterdir()) == []


def test_compilation_reports_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    passes = ["quantize-weights bits=8 min_size=1 min_rows=0 activations=int8-rows"]
    given = {"passes": passes, "store": tmp_path}
    compiled = lamella.compile(model, (torch.randn(4, 64),), backend=Wrong(), **given)
    assert compiled.report is not None
    assert any("failed their probe" in remark for remark in compiled.report.remarks)


def test_a_folder_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    prober = Prober(EAGER, place)
    prober.probes([FLOATS])
    assert any("can't be kept" in problem for problem in prober.problems)
