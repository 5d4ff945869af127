"""How long a call of a graph takes, from measured kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.passes.base import Analyses, Analysis
from lamella.passes.products import kernels_of, products_of
from lamella.passes.times import Kernel, Times, Workload, needed


@dataclass(frozen=True)
class KernelShare:
    """A kernel of a graph.

    Attributes:
        kernel: The kernel.
        count: How often a call runs it.
        seconds: Measured time of one run.
    """

    kernel: Kernel
    count: int
    seconds: float


@dataclass(frozen=True)
class LatencyReport:
    """The predicted time of a call.

    Attributes:
        workload: The call.
        kernels: Products with weights, those that take longest first.
        rest_seconds: Everything else.
    """

    workload: Workload
    kernels: tuple[KernelShare, ...] = field(repr=False)
    rest_seconds: float

    @property
    def kernel_seconds(self) -> float:
        """All products with weights."""
        return sum(share.count * share.seconds for share in self.kernels)

    @property
    def seconds(self) -> float:
        """The whole call."""
        return self.kernel_seconds + self.rest_seconds


@dataclass(frozen=True)
class Latency(Analysis[LatencyReport]):
    """Predicted time of a call: the measured kernels of its products, and a measured rest.

    The sum over all linear layers of the median time of their kernel at their shape, format and
    rows, with weights as cold as in the whole model; layers that the backend merges are one
    kernel. The rest (attention, norms, the call itself) is measured once for a graph, on the
    whole model, and does not depend on formats.

    Attributes:
        rows: For a language model with a past the sequences that each read one token, else the
            tokens of one input; None means 1 and 128.
        past: Tokens in the cache of a language model, 0 for a prompt; None means 128.

    Raises:
        ValueError: `rows` is less than 1, or `past` is negative.
    """

    name: ClassVar[str] = "latency"

    rows: int | None = None
    past: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self.rows, self.past)

    def run(self, graph: Graph, analyses: Analyses) -> LatencyReport:
        """Ask for the kernels of every linear layer.

        Raises:
            PassError: There are no measured times.
        """
        times = needed(analyses.times, "analysis 'latency'")
        return predicted(graph, Workload.of(graph, self.rows, self.past), times)


def predicted(
    graph: Graph,
    workload: Workload,
    times: Times,
    plan: Mapping[str, Format] | None = None,
) -> LatencyReport:
    """The report of `Latency`, for `graph` with its weights stored as `plan` says."""
    merged = times.merges and workload.past is not None
    counts = kernels_of(products_of(graph, workload, times), merged, plan)
    known = times.seconds(counts)
    shares = [KernelShare(kernel, count, known[kernel]) for kernel, count in counts.items()]
    shares.sort(key=lambda share: -share.count * share.seconds)
    return LatencyReport(workload, tuple(shares), times.rest(graph, workload))


def check_sizes(rows: int | None, past: int | None) -> None:
    """Refuse sizes of a call that there are not.

    Raises:
        ValueError: `rows` is less than 1, or `past` is negative.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if past is not None and past < 0:
        raise ValueError(f"past must not be negative, got {past}")
