"""Measuring kernels and whole models: what runs, what is kept, what is said. No time is judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lamella
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.torch.eager import EagerBackend
from lamella.errors import BackendError
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.ir.quantize import Format
from lamella.passes.base import Analyses
from lamella.passes.products import kernels_of, products_of
from lamella.passes.sites import find_sites
from lamella.passes.times import Kernel, Table, Workload
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from lamella.timing import Timing
from lamella.tuning import measure, tuner
from lamella.tuning.chain import MadeUp, chain
from lamella.tuning.machine import cache_bytes, environment, machine
from lamella.tuning.measure import measure_kernels
from lamella.tuning.stand_in import stand_in, uniform
from lamella.tuning.survey import survey
from lamella.tuning.tuner import Tuner
from lamella.tuning.whole import STEPS, call_of_graph, times_of
from tests.tiny import TEXTS, save_language_model

KINDS = (
    Kernel("linear", 48, 40, 1),
    Kernel("nbits", 48, 40, 3, "float32", 4, 32),
    Kernel("nbits", 48, 40, 1, "float32", 2, 32, symmetric=False),
    Kernel("int8-tensor", 48, 40, 1),
    Kernel("int8-rows", 48, 40, 3),
    Kernel("rounding-rows", 48, 0, 3, cold=False),
    Kernel("linear", 48, 40, 2, "float64"),
)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("tuning") / "model", layers=2)


# ---- kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KINDS, ids=str)
def test_a_chain_is_the_kernel_several_times(kernel: Kernel) -> None:
    graph = chain(kernel, 4, MadeUp(1 << 16))
    apart = kernel.kind.startswith("rounding")
    assert len(graph.inputs) == (4 if apart else 1)
    outputs = kernel.outputs or 8
    values = [torch.randn(kernel.rows, 48, dtype=getattr(torch, kernel.dtype))] * len(graph.inputs)
    results = graph.run(values)
    assert [list(r.shape) for r in results] == [[kernel.rows, outputs]] * 4
    if not apart:
        # Weights of their own, or a cache would hold them.
        assert len({float(r.sum()) for r in results}) == 4
        found = kernels_of(products_of(graph, Workload(kernel.rows, 1), Table({})), False)
        assert found.pop(kernel) == 4
        assert all(k.kind.startswith("rounding") for k in found)


@pytest.mark.parametrize(
    "backend", [OnnxRuntimeBackend(threads=1), EagerBackend()], ids=["onnxruntime", "eager"]
)
def test_every_kernel_gets_a_time(backend: Any) -> None:
    wanted = [k for k in KINDS if k.dtype == "float32"]
    told: list[tuple[int, int]] = []
    found: dict[Kernel, float] = {}
    for some in measure_kernels(backend, wanted, 2**16, lambda *x: told.append(x)):
        found.update(some)
    assert set(found) == set(wanted)
    assert all(seconds > 0 for seconds in found.values())
    assert told[-1] == (len(wanted), len(wanted))


def test_kernels_that_don_t_fit_together_are_measured_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "BATCH_BYTES", 1)
    found = list(measure_kernels(EagerBackend(), KINDS[:3], 2**16))
    assert [len(some) for some in found] == [1, 1, 1]


def test_an_interruption_keeps_what_has_enough_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Counter[int]()
    real = measure.Candidate.turn

    def turn(self: measure.Candidate) -> None:
        turns[id(self)] += 1
        if turns[id(self)] > measure.ROUNDS[0]:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(measure.Candidate, "turn", turn)
    kept: dict[Kernel, float] = {}

    def keep() -> None:
        for some in measure_kernels(EagerBackend(), KINDS[:2], 2**16):
            kept.update(some)

    with pytest.raises(KeyboardInterrupt):
        keep()
    assert set(kept) == set(KINDS[:2])
    monkeypatch.setattr(measure, "ROUNDS", (99, 99))
    turns.clear()
    monkeypatch.setattr(measure.Candidate, "turn", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(measure_kernels(EagerBackend(), KINDS[:2], 2**16))


def _interrupted(self: measure.Candidate) -> None:
    raise KeyboardInterrupt


def test_the_machine_in_words() -> None:
    assert "core" in machine()
    assert cache_bytes() > 0
    text = environment("onnxruntime", 2)
    assert machine() in text
    assert f"torch {torch.__version__}" in text
    assert "table" in text


# ---- stand-ins --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("format", [Format(4), Format(2, 64, symmetric=False)], ids=str)
def test_a_stand_in_is_the_model_with_other_codes(
    family: str, format: Format, captured: Callable[[str], Graph]
) -> None:
    graph = captured(family)
    plan = {site.weight: format for site in find_sites(graph)}
    twin = stand_in(graph, plan, MadeUp(1 << 16))
    real = graph.copy()
    options = {"bits": format.bits, "block": format.block, "symmetric": format.symmetric}
    QuantizeWeights(min_size=0, **options).run(real, Analyses(real))
    real.finish()
    assert _operators(twin) == _operators(real)
    assert twin.weight_bytes() == real.weight_bytes()
    assert not graph.find(lam.linear_nbits.default)
    times = Table({})
    workload = Workload(tokens=5)
    kernels = [kernels_of(products_of(g, workload, times), True) for g in (twin, real)]
    assert kernels[0] == kernels[1]


def test_small_weights_have_no_place_in_a_uniform_plan(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    large = {site.weight for site in find_sites(graph) if site.size >= 1 << 14}
    assert set(uniform(graph, Format(4))) == large


def _operators(graph: Graph) -> Counter[object]:
    return Counter(node.target for node in graph.nodes if node.op == "call_function")


# ---- whole models -----------------------------------------------------------------------


@pytest.mark.parametrize("workload", [Workload(2, 1, 6), Workload(1, 7, 0)], ids=str)
def test_a_call_of_a_language_model(workload: Workload, captured: Callable[[str], Graph]) -> None:
    call, count = call_of_graph(captured("llama"), EagerBackend(), workload)
    assert count == (STEPS if workload.past else 1)
    # The cache goes back: a call can be repeated any number of times.
    for _ in range(3):
        call()
    times = times_of({"one": (call, count)}, rounds=2)
    assert times["one"].median_seconds > 0


def test_a_recurrence_decodes_on(captured: Callable[[str], Graph]) -> None:
    call, count = call_of_graph(captured("mamba"), EagerBackend(), Workload(1, 1, 4))
    for _ in range(2):
        call()
    assert count == STEPS


# ---- the tuner --------------------------------------------------------------------------


class Laboratory:
    """Stands in for what measures: a microsecond for every row, and counts what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[Kernel] = []
        self.whole = 0
        monkeypatch.setattr(tuner, "measure_kernels", self._kernels)
        monkeypatch.setattr(tuner, "times_of", self._wholes)

    def _kernels(
        self, backend: Any, kernels: Iterable[Kernel], *_: Any
    ) -> Iterator[Mapping[Kernel, float]]:
        for kernel in kernels:
            self.measured.append(kernel)
            yield {kernel: 1e-6 * kernel.rows}

    def _wholes(self, calls: Mapping[str, Any]) -> Mapping[str, Timing]:
        self.whole += len(calls)
        return {name: Timing(1e-3 * (1 + int(name)), 1e-3, 0.1, 5) for name in calls}


@pytest.fixture
def laboratory(monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    return Laboratory(monkeypatch)


def _tuner(folder: Path, **options: Any) -> Tuner:
    return Tuner(EagerBackend, folder, **options)


def test_what_is_known_is_not_measured_again(laboratory: Laboratory, tmp_path: Path) -> None:
    first = _tuner(tmp_path)
    assert first.seconds([KINDS[0], KINDS[1]]) == {KINDS[0]: 1e-6, KINDS[1]: 3e-6}
    (note,) = first.take_notes()
    assert note.startswith("measured 2 kernels in ")
    assert first.take_notes() == ()
    second = _tuner(tmp_path)
    assert second.seconds(KINDS[:3])[KINDS[2]] == 1e-6
    assert laboratory.measured == list(KINDS[:3])
    again = _tuner(tmp_path, again=True)
    again.seconds(KINDS[:1])
    again.seconds(KINDS[:1])
    assert laboratory.measured == [*KINDS[:3], KINDS[0]]
    assert not any(one.take_problems() for one in (first, second, again))


def test_an_interrupted_measurement_keeps_what_it_has(
    laboratory: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = laboratory._kernels

    def stopped(*arguments: Any) -> Iterator[Mapping[Kernel, float]]:
        yield next(real(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "measure_kernels", stopped)
    with pytest.raises(KeyboardInterrupt):
        _tuner(tmp_path).seconds(KINDS[:3])
    monkeypatch.setattr(tuner, "measure_kernels", real)
    laboratory.measured.clear()
    _tuner(tmp_path).seconds(KINDS[:3])
    assert laboratory.measured == list(KINDS[1:3])


def test_a_corrupt_store_is_said_and_measured_anew(laboratory: Laboratory, tmp_path: Path) -> None:
    _tuner(tmp_path).seconds(KINDS[:1])
    (file,) = tmp_path.rglob("*.json")
    file.write_text("{")
    other = _tuner(tmp_path)
    assert other.seconds(KINDS[:1]) == {KINDS[0]: 1e-6}
    (problem,) = other.take_problems()
    assert "is corrupt" in problem
    assert len(laboratory.measured) == 2
    last = _tuner(tmp_path)
    last.seconds(KINDS[:1])
    assert (len(laboratory.measured), last.take_problems()) == (2, ())


def test_times_of_another_machine_are_not_used(
    laboratory: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tuner(tmp_path).seconds(KINDS[:1])
    monkeypatch.setattr("lamella.tuning.machine.machine", lambda: "another processor, 64 cores")
    other = _tuner(tmp_path)
    other.seconds(KINDS[:1])
    (problem,) = other.take_problems()
    assert "were measured elsewhere" in problem
    assert "another processor, 64 cores" in problem
    assert len(laboratory.measured) == 2
    # Another backend on the same machine is nothing to speak of.
    third = Tuner(lambda: OnnxRuntimeBackend(threads=1), tmp_path)
    third.seconds(KINDS[:1])
    assert len(laboratory.measured) == 3
    assert third.take_problems() == ()


def test_a_store_that_can_not_be_written_is_said(laboratory: Laboratory, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    one = _tuner(tmp_path / "file")
    assert one.seconds(KINDS[:1]) == {KINDS[0]: 1e-6}
    (problem,) = one.take_problems()
    assert "give another folder" in problem


def test_the_rest_is_what_kernels_don_t_explain(
    laboratory: Laboratory, tmp_path: Path, captured: Callable[[str], Graph]
) -> None:
    graph, workload = captured("llama"), Workload(1, 1, 4)
    one = _tuner(tmp_path)
    found = one.rest(graph, workload)
    # 1 and 2 ms of the references, a microsecond for every linear layer.
    layers = kernels_of(products_of(graph, workload, one), False).total()
    assert found == pytest.approx(1.5e-3 - 1e-6 * layers, rel=1e-9)
    assert list(one.workloads) == [workload]
    assert laboratory.whole == 2
    plan = {site.weight: Format(8) for site in find_sites(graph)}
    # A graph whose weights are stored otherwise has the same rest, another call has its own.
    assert _tuner(tmp_path).rest(stand_in(graph, plan, MadeUp(1 << 16)), workload) == found
    assert laboratory.whole == 2
    _tuner(tmp_path).rest(graph, Workload(1, 1, 8))
    assert laboratory.whole == 4


def test_a_call_that_fails_says_how_to_ask_for_another(
    laboratory: Laboratory,
    tmp_path: Path,
    captured: Callable[[str], Graph],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise BackendError("sizes don't fit")

    monkeypatch.setattr(tuner, "call_of_graph", lambda *_: (fails, 1))
    with pytest.raises(BackendError) as caught:
        _tuner(tmp_path).rest(captured("bert"), Workload(1, 3))
    assert any("rows=" in note for note in caught.value.__notes__)


def test_a_survey_has_every_shape_in_every_format(
    laboratory: Laboratory, tmp_path: Path, captured: Callable[[str], Graph]
) -> None:
    graph = captured("bert")
    lines = survey(graph, _tuner(tmp_path), ["fp32", "4/32z", "int8-rows"], [1, 5])
    shapes = {
        (p.kernel.inputs, p.kernel.outputs) for p in products_of(graph, Workload(), Table({}))
    }
    assert {(line.inputs, line.outputs) for line in lines} == shapes
    assert len(lines) == 3 * len(shapes)
    assert all(line.seconds == {1: 1e-6, 5: 1e-6 * 5} for line in lines)
    assert all(line.bandwidth == line.weight_bytes / 1e-6 for line in lines)
    with pytest.raises(ValueError, match="no format '3/32'"):
        survey(graph, _tuner(tmp_path), ["3/32"])
    with pytest.raises(ValueError, match="rows must be at least 1"):
        survey(graph, _tuner(tmp_path), ["fp32"], [0])


# ---- all of it --------------------------------------------------------------------------


def test_compile_measures_on_demand_and_says_so(
    laboratory: Laboratory, language_model: Path, tmp_path: Path
) -> None:
    compiled = lamella.compile(
        language_model,
        passes=[
            "allocate-bits budget=1 unit=s min_size=0 past=5 by=weight-error",
            "quantize-weights",
        ],
        samples=list(TEXTS[:4]),
        store=tmp_path,
    )
    report = compiled.report
    assert report is not None
    (latency,) = report.latency
    assert (latency.subject, latency.inputs) == ("compiled", "batch=1 tokens=1 past=5")
    assert latency.predicted_seconds is not None
    assert latency.predicted_seconds > 0
    assert latency.measured_seconds is not None
    assert latency.measured_seconds > 0
    assert any("kernels in" in remark for remark in report.passes[0].remarks)
    assert list(tmp_path.rglob("*.json"))


def test_the_latency_of_a_model(
    laboratory: Laboratory, language_model: Path, tmp_path: Path
) -> None:
    found = lamella.analyze(language_model, "latency past=3", backend="eager", store=tmp_path)
    assert found.workload == Workload(1, 1, 3)
    # Seven layers in each of two blocks, and the head: eager merges nothing.
    assert found.kernel_seconds == pytest.approx(15e-6, rel=1e-9)
