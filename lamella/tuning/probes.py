"""Kernels are tried before they are trusted: are they right, and faster than floats?

A probe runs one layer in a format: on a small shape beside the emulator (the canonical operator
itself), and on a shape of 1024 x 1024 beside what one has without it: the same layer with a weight
that was dequantized before, or for an embedding a table that is dequantized in the call (rows of
floats are just copied). Products of integers see some rows, others one. What is found is kept with
the measured times of kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.backends.base import Backend
from lamella.backends.formats import QuantFormat
from lamella.errors import BackendError
from lamella.ir.ops import aten, lam
from lamella.ir.packing import dequantize
from lamella.tuning.layers import layer, sample
from lamella.tuning.machine import environment_of
from lamella.tuning.measure import Progress
from lamella.tuning.store import Store, user_store

SMALL, LARGE, CHANNELS = (64, 64), (1024, 1024), (64, 64)
"""Outputs and inputs of the layer that is checked, and of the one that is timed."""

ROWS = 32
"""Rows of the layer that is checked."""

_MANY, _ONE = 16, 1

_VERSION = 1
_ROUNDS = 9
_LEAST = 1e-12
"""The store keeps positive numbers."""


@dataclass(frozen=True)
class Probe:
    """What was found of a kernel.

    Attributes:
        format: In which it ran.
        off: Largest difference from the emulator, over the largest result; infinite where the
            kernel refused.
        seconds: Median time of the layer.
        dense_seconds: Of the layer without it.
    """

    format: QuantFormat
    off: float
    seconds: float
    dense_seconds: float

    @property
    def is_right(self) -> bool:
        """Whether it computes what the emulator computes."""
        return self.off <= self.format.tolerance

    @property
    def is_faster(self) -> bool:
        """Whether it takes less time than floats; floats themselves are not compared."""
        return self.format.bits >= 16 or self.seconds < self.dense_seconds

    @property
    def obstacle(self) -> str:
        """Why the format is not offered here, or nothing."""
        if not self.is_right:
            most = self.format.tolerance
            return f"its results are off by {self.off:.2g}, where {most:.2g} is right"
        if not self.is_faster:
            took, floats = self.seconds * 1e3, self.dense_seconds * 1e3
            return f"{took:.3g} ms for a large layer, {floats:.3g} ms without"
        return ""


class Prober:
    """Tries kernels, and remembers what was found on this machine with these versions."""

    def __init__(
        self,
        backend: Backend,
        folder: Path | None = None,
        *,
        again: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Nothing is run before somebody asks.

        Args:
            backend: Whose kernels.
            folder: Of the store; None means that of the user.
            again: Try what the store knows once more.
            progress: Told how many kernels were tried, of how many.
        """
        self._backend, self._again = backend, again
        self._progress = progress or _quiet
        self._store = Store(folder or user_store(), f"{environment_of(backend)}; {_VERSION}")
        self.problems: list[str] = []

    def probes(self, formats: Iterable[QuantFormat] | None = None) -> tuple[Probe, ...]:
        """What there is to say of some formats; of all that the backend names without."""
        wanted = list(self._backend.formats() if formats is None else dict.fromkeys(formats))
        held = {} if self._again else self._store.read().figures
        known = {name: figure.seconds for name, figure in held.items()}
        new: dict[str, float] = {}
        missing = [format for format in wanted if _names(format)[0] not in known]
        for done, format in enumerate(missing):
            self._progress(done, len(missing))
            new |= dict(zip(_names(format), _run(self._backend.trial(), format), strict=True))
        if new:
            self._keep(new)
        found = known | new
        return tuple(Probe(one, *(found[name] for name in _names(one))) for one in wanted)

    def _keep(self, figures: Mapping[str, float]) -> None:
        try:
            self._store.write(figures)
        except OSError as error:
            self.problems.append(f"probes of kernels can't be kept ({error})")


def _quiet(*_: int) -> None:
    """Progress that nobody sees."""


def _names(format: QuantFormat) -> tuple[str, str, str]:
    stem = f"probe {format}"
    return f"{stem} off", f"{stem} seconds", f"{stem} floats"


def _run(backend: Backend, format: QuantFormat) -> tuple[float, float, float]:
    """Difference from the emulator, and the seconds with and without the format."""
    try:
        off = max(_difference(backend, format), _LEAST)
        calls = [_call(backend, format, format), _rival(backend, format)]
    except BackendError:
        return float("1e30"), 1e30, 1e30
    taken = _medians(calls)
    if taken[0] >= taken[1]:
        # Somebody else may have used the machine: what speaks against a kernel is measured twice.
        taken = min(taken, _medians(calls), key=lambda pair: pair[0] / pair[1])
    return off, *taken


def _medians(calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """Median seconds of two calls that take turns."""
    seconds: list[list[float]] = [[], []]
    for _ in range(_ROUNDS):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            seconds[place].append(time.perf_counter() - start)
    first, second = (statistics.median(one[2:]) for one in seconds)
    return first, second


def _difference(backend: Backend, format: QuantFormat) -> float:
    graph = layer(format, SMALL)
    value = sample(format.role, SMALL, ROWS)
    want = _only(graph(value))
    got = _only(backend.lower(graph)(value))
    if not torch.isfinite(got).all():
        return float("1e30")
    return float((got - want).abs().max() / want.abs().max())


def _call(backend: Backend, format: QuantFormat, timed: QuantFormat) -> Callable[[], object]:
    """A layer in `format`, on as many rows as tell something about the one that is timed."""
    rows = _MANY if timed.activations.startswith("int8-") and not timed.block else _ONE
    shape = CHANNELS if format.role == "convolution" else LARGE
    rows = 1 if format.role == "convolution" else rows
    executable = backend.lower(layer(format, shape))
    return executable.repeated([sample(format.role, shape, rows)])


def _rival(backend: Backend, format: QuantFormat) -> Callable[[], object]:
    """What one has without a format."""
    if format.role != "embedding" or format.bits == 32:
        plain: Any = backend
        if getattr(backend, "bfloat16", False):
            plain = replace(plain, bfloat16=False)
        return _call(plain, _floats(format), format)
    graph = layer(format, LARGE)
    (node,) = graph.find(lam.embedding_nbits.default)
    packed, scales = (graph.weight(graph.operand(node, name)) for name in ("packed", "scales"))
    zeros = graph.operand(node, "zero_points")
    stored = (packed, scales, None if zeros is None else graph.weight(zeros))
    ids = sample("embedding", LARGE, _ONE)
    return lambda: dequantize(*stored, format.bits, format.block, LARGE[1])[ids]


def _floats(format: QuantFormat) -> QuantFormat:
    """The same layer with a weight of floats."""
    operators = {
        "linear": aten.linear.default,
        "embedding": aten.embedding.default,
        "convolution": aten.conv2d.default,
    }
    return QuantFormat("fp32", format.role, operators[format.role], 32, "floats")


def _only(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else next(iter(value))
