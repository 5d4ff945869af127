"""Measured latency of a model before and after every pass, in one interleaved run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial

from lamella.backends.base import Backend
from lamella.backends.inputs import example_inputs
from lamella.ir.graph import Graph
from lamella.passes.instruments import Instrument, Step
from lamella.report import Latency
from lamella.timing import measure

_SIZES = re.compile(r"([1-9]\d*)x([1-9]\d*)")


@dataclass
class Snapshots(Instrument):
    """Keeps the graph before the first pass and after each one that edited it.

    Copies share their weights, so that only what a pass replaced is held twice.

    Attributes:
        batch: Batch of the inputs that are timed.
        sequence: Their sequence.
        rounds: Timed calls of each graph.
    """

    batch: int = 1
    sequence: int = 128
    rounds: int = 20
    graphs: dict[str, Graph] = field(default_factory=dict[str, Graph], init=False)

    @classmethod
    def of(cls, sizes: str) -> Snapshots:
        """From ``"1x128"``: batch 1, sequence 128.

        Raises:
            ValueError: `sizes` is not written like this.
        """
        found = _SIZES.fullmatch(sizes)
        if found is None:
            raise ValueError(f"sizes are written like 1x128 (batch and sequence), got {sizes!r}")
        return cls(batch=int(found[1]), sequence=int(found[2]))

    def before_pass(self, step: Step) -> None:
        """Keep the original."""
        if step.index == 0:
            self.graphs = {"original": step.graph.copy()}

    def after_pass(self, step: Step) -> None:
        """Keep what the pass made of it."""
        if step.edits:
            self.graphs[f"after {step.index + 1}. {step.transform.name}"] = step.graph.copy()

    def measured(self, backend: Backend) -> tuple[Latency, ...]:
        """Lower every graph to `backend` and time them in turns."""
        calls = {}
        for subject, graph in self.graphs.items():
            executable = backend.lower(graph)
            sizes = {"batch": self.batch, "sequence": self.sequence}
            calls[subject] = partial(executable.run, example_inputs(executable.inputs, **sizes))
        timings = measure(calls, rounds=self.rounds)
        inputs = f"batch={self.batch} sequence={self.sequence}"
        return tuple(
            Latency(backend.name, subject, inputs, measured_seconds=timing.median_seconds)
            for subject, timing in timings.items()
        )
