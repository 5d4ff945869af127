"""What was predicted, beside what was compiled."""

from __future__ import annotations

from collections.abc import Iterator

from lamella.backends.base import Executable
from lamella.ir.graph import Graph
from lamella.passes.analyses.latency import predicted
from lamella.report import Latency
from lamella.tuning.tuner import Tuner
from lamella.tuning.whole import call_of_executable, times_of


def latencies(executable: Executable, graph: Graph, tuner: Tuner) -> Iterator[Latency]:
    """Predicted and measured time of every call that a pass asked about.

    Args:
        executable: What was compiled.
        graph: After the last pass.
        tuner: Whom the passes asked.
    """
    for workload in list(tuner.workloads):
        expected = predicted(graph, workload, tuner).seconds
        call = call_of_executable(executable, workload)
        found = None if call is None else times_of({"compiled": call})["compiled"].median_seconds
        yield Latency(executable.backend, "compiled", str(workload), expected, found)
