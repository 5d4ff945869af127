"""Only kernels that passed their probe are used; other layers take the next exact route.

A kernel that is wrong on this machine is never used. One that is slower than floats is used
where somebody asks for it (`Backend.slow_kernels`): its weights are still the smaller ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lamella.backends.base import Backend
from lamella.backends.dense import make_dense
from lamella.backends.formats import QuantFormat, of_node
from lamella.errors import BackendError
from lamella.ir.graph import Graph
from lamella.tuning.probes import Probe, Prober

_NOT_OFFERED = "a kernel is not offered on this machine"


@dataclass(frozen=True)
class Offered:
    """What to lower, and by what.

    Attributes:
        graph: The graph that was given, or a copy with some layers of floats.
        backend: The backend that was given, or one without some kernels.
        remarks: What was tried, refused and done instead, each a sentence.
    """

    graph: Graph
    backend: Backend
    remarks: tuple[str, ...] = ()


def offered(
    graph: Graph, backend: Backend, folder: Path | None = None, *, strict: bool = False
) -> Offered:
    """Try the kernels that a graph would use, unless they were tried here before.

    Args:
        graph: Stays as it is.
        backend: Whose kernels.
        folder: Of the store; None means that of the user.
        strict: Make a kernel that is not offered an error.

    Raises:
        BackendError: With `strict`, a kernel is wrong or slow here.
    """
    wanted = used(graph, backend)
    if not wanted:
        return Offered(graph, backend)
    prober = Prober(backend, folder)
    failed = [one for one in prober.probes(wanted) if one.obstacle]
    refused = [one for one in failed if not (one.is_right and backend.slow_kernels)]
    if refused and strict:
        listed = "; ".join(_why(one) for one in refused)
        slow = all(one.is_right for one in refused)
        more = ", or these kernels with slow_kernels=True of the backend" if slow else ""
        raise BackendError(
            f"{_NOT_OFFERED}: {listed}; choose other formats, or allow floats in their place with "
            f"strict=False{more}"
        )
    kept = tuple(f"used as asked: {_why(one)}" for one in failed if one not in refused)
    remarks = (*kept, *prober.problems)
    return _without(Offered(graph, backend, remarks), refused)


def used(graph: Graph, backend: Backend) -> tuple[QuantFormat, ...]:
    """The formats of few bits that the layers of a graph are in, as far as a backend knows them."""
    formats = backend.formats()
    found = (of_node(node, formats) for node in graph.nodes if node.op == "call_function")
    return tuple(dict.fromkeys(one for one in found if one is not None))


def _without(found: Offered, refused: Sequence[Probe]) -> Offered:
    """The routes around some kernels, and what they are."""
    graph, backend, told = found.graph, found.backend, list(found.remarks)
    dense: dict[QuantFormat, Probe] = {}
    for one in refused:
        other = backend.without(one.format)
        if other is None:
            dense[one.format] = one
        else:
            backend = other
            told.append(f"{_NOT_OFFERED}: {_why(one)}; its layers run without it, as exactly")
    if not dense:
        return Offered(graph, backend, tuple(told))
    graph, formats = graph.copy(), found.backend.formats()
    layers, nbytes = dict.fromkeys(dense, 0), dict.fromkeys(dense, 0)
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        format = of_node(node, formats)
        if format in dense:
            layers[format] += 1
            nbytes[format] += make_dense(graph, node)
    graph.finish()
    for format, one in dense.items():
        told.append(
            f"{_NOT_OFFERED}: {_why(one)}; {layers[format]} layers have weights of floats "
            f"instead, {nbytes[format] / 1e6:.3g} MB of them"
        )
    return Offered(graph, backend, tuple(told))


def _why(probe: Probe) -> str:
    return f"{probe.format} ({probe.format.kernel}): {probe.obstacle}"
