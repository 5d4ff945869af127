"""Times for passes: from the store where they are known, measured where not."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import final

from lamella.backends.base import Backend
from lamella.errors import BackendError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.quantize import Format
from lamella.ir.symbols import shape_of
from lamella.passes.instruments import Instrument, Step
from lamella.passes.products import kernels_of, products_of
from lamella.passes.times import Kernel, Times, Workload
from lamella.tuning.chain import MadeUp
from lamella.tuning.machine import cache_bytes, environment_of
from lamella.tuning.measure import Progress, measure_kernels
from lamella.tuning.stand_in import stand_in, uniform
from lamella.tuning.store import Contents, Store, user_store
from lamella.tuning.whole import Call, call_of_graph, times_of

REFERENCES = (Format(4, 64), Format(8, 64))
"""Plans whose whole models are timed; what their kernels don't explain is the rest."""

_DEPENDS_ON_THE_PLAN = frozenset(
    {
        aten.linear.default,
        aten.embedding.default,
        aten.to.dtype,
        lam.linear_nbits.default,
        lam.linear_int8.default,
        lam.embedding_nbits.default,
    }
)


@final
class Tuner(Times):
    """Measures on this machine, and remembers.

    Attributes:
        workloads: The calls that somebody asked about.
    """

    def __init__(
        self,
        backend: Callable[[], Backend],
        folder: Path | None = None,
        *,
        again: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Nothing is read or measured before somebody asks.

        Args:
            backend: Gives what models will run on.
            folder: Of the store; None means that of the user.
            again: Measure what the store knows once more.
            progress: Told how many kernels are measured.
        """
        self._make_backend, self._given = backend, folder
        self._again, self._progress = again, progress
        self._new: dict[str, float] = {}
        self._notes: list[str] = []
        self._problems: list[str] = []
        self.workloads: dict[Workload, None] = {}

    @property
    def merges(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """ONNX Runtime has layers on one input as one product."""
        return self.backend.name == "onnxruntime"

    @cached_property
    def cache_bytes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of this machine."""
        return cache_bytes()

    @cached_property
    def backend(self) -> Backend:
        """What models run on."""
        return self._make_backend()

    def seconds(self, kernels: Iterable[Kernel]) -> Mapping[Kernel, float]:
        """Look kernels up, and measure those that nobody measured here before."""
        wanted = list(dict.fromkeys(kernels))
        known = self._figures
        missing = [kernel for kernel in wanted if str(kernel) not in known]
        if missing:
            self._measure(missing)
            known = self._figures
        return {kernel: known[str(kernel)] for kernel in wanted}

    def rest(self, graph: Graph, workload: Workload) -> float:
        """Look it up, or time two whole models and take off what their kernels take."""
        self.workloads[workload] = None
        name = f"rest {_digest(graph)} {workload}"
        if name not in self._figures:
            start = time.perf_counter()
            self._keep({name: self._measured_rest(graph, workload)})
            self._notes.append(
                f"measured the rest of the graph for {workload} in "
                f"{time.perf_counter() - start:.1f} s"
            )
        return self._figures[name]

    def take_notes(self) -> tuple[str, ...]:
        """What was measured since the last call, and how long that took."""
        taken, self._notes = tuple(self._notes), []
        return taken

    def take_problems(self) -> tuple[str, ...]:
        """Files of the store that could not be used."""
        taken, self._problems = tuple(self._problems), []
        return taken

    @cached_property
    def _folder(self) -> Path:
        return self._given or user_store()

    @cached_property
    def _store(self) -> Store:
        return Store(self._folder, environment_of(self.backend))

    @cached_property
    def _held(self) -> Contents:
        held = self._store.read()
        self._problems += held.corrupt
        if self._given is not None and not held.figures:
            self._refuse_foreign()
        return held

    def _refuse_foreign(self) -> None:
        """Say that a folder that was asked for has times of other machines alone."""
        others, here = self._store.others(), self._store.environment.partition(";")[0]
        if others and not any(other.startswith(f"{here};") for other in others):
            self._problems.append(
                f"the times in {str(self._folder)!r} were measured elsewhere "
                f"({' | '.join(others)}) and are measured anew for {self._store.environment}"
            )

    @property
    def _figures(self) -> Mapping[str, float]:
        held = {} if self._again else self._held.figures
        return {name: figure.seconds for name, figure in held.items()} | self._new

    def _measure(self, kernels: list[Kernel]) -> None:
        if not kernels:
            return
        start = time.perf_counter()
        groups = measure_kernels(self.backend, kernels, self.cache_bytes, self._progress)
        for found in groups:
            self._keep({str(kernel): seconds for kernel, seconds in found.items()})
        self._notes.append(
            f"measured {len(kernels)} kernels in {time.perf_counter() - start:.1f} s on "
            f"{self._store.environment}"
        )

    def _keep(self, figures: Mapping[str, float]) -> None:
        self._new |= figures
        try:
            self._store.write(figures)
        except OSError as error:
            self._problems.append(
                f"measured times can't be kept in {str(self._folder)!r} ({error}); give another "
                f"folder as store"
            )

    def _measured_rest(self, graph: Graph, workload: Workload) -> float:
        """The mean over the references of whole model minus kernels.

        Kernels that were measured at another time are measured once more: the machine may have
        been faster or slower then, and the rest is a small difference of large numbers.
        """
        made_up = MadeUp()
        models = [stand_in(graph, uniform(graph, format), made_up) for format in REFERENCES]
        calls = [call_of_graph(model, self.backend, workload) for model in models]
        _try(calls[0], workload)
        merged = self.merges and workload.past is not None
        counts = [kernels_of(products_of(model, workload, self), merged) for model in models]
        kernels = list(dict.fromkeys(kernel for count in counts for kernel in count))
        self._measure([kernel for kernel in kernels if str(kernel) not in self._new])
        whole = times_of({str(index): call for index, call in enumerate(calls)})
        rests = [
            whole[str(index)].median_seconds
            - sum(n * self._new[str(kernel)] for kernel, n in count.items())
            for index, count in enumerate(counts)
        ]
        # A rest that noise hides is small all the same.
        return max(sum(rests) / len(rests), 1e-6)


class Tuning(Instrument):
    """Lets the passes of a pipeline ask a `Times`."""

    def __init__(self, times: Times) -> None:
        """Hand out `times`."""
        self._times = times

    def before_pass(self, step: Step) -> None:
        """Put it where passes look."""
        step.analyses.times = self._times

    def after_pass(self, step: Step) -> None:
        """Nothing to do."""


def _try(call: Call, workload: Workload) -> None:
    """Run once, and say of which sizes when that fails."""
    try:
        call[0]()
    except BackendError as error:
        error.add_note(f"a call of {workload} was timed; ask for another with rows= and past=")
        raise


def _digest(graph: Graph) -> str:
    """Equal for graphs that differ in the formats of their weights only."""
    counted = Counter(
        f"{ops.op_name(node.target)} {shape_of(node)}"
        for node in graph.nodes
        if node.op == "call_function" and node.target not in _DEPENDS_ON_THE_PLAN
    )
    layers = sum(node.target in _DEPENDS_ON_THE_PLAN - {aten.to.dtype} for node in graph.nodes)
    text = "\n".join(f"{count} {name}" for name, count in sorted(counted.items()))
    return hashlib.sha256(f"{layers} {text}".encode()).hexdigest()[:16]
