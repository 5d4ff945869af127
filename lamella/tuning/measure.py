"""Times of kernels: small executables that take turns, with weights as cold as in a model.

A decoder reads all its weights from memory for every token. A kernel that is called again and
again with one weight finds it in the cache and is two to three times as fast, so that an
executable holds several copies with weights of their own, and between two turns of one of them
more memory is read than the caches hold.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from lamella.backends.base import Backend, Executable
from lamella.passes.times import Kernel
from lamella.tuning.chain import ROUNDINGS, MadeUp, chain

Progress = Callable[[int, int], object]
"""Told how many kernels are done, and of how many."""

COPY_BYTES = 24 * 2**20
"""Weights of the copies of a kernel in one executable: enough for a call to take longer than it
takes to start one."""
COPIES = (2, 32)
"""The least and the most of them."""
BATCH_BYTES = 2**30
"""Weights of the executables that take turns."""
ROUNDS = (5, 15)
"""The least and the most turns of a kernel."""
SECONDS_EACH = 0.12
"""A kernel has no more turns, after the least, once it took this."""

_START = Kernel("linear", 64, 1024, 1)


@dataclass
class Candidate:
    """A kernel that takes turns.

    Attributes:
        kernel: The kernel.
        call: Runs all its copies.
        copies: How many those are.
        seconds: Of the turns so far.
    """

    kernel: Kernel
    call: Callable[[], object]
    copies: int
    seconds: list[float] = field(default_factory=list[float])

    def turn(self) -> None:
        """Run once."""
        if not self.kernel.cold:
            self.call()
        start = time.perf_counter()
        self.call()
        self.seconds.append(time.perf_counter() - start)

    @property
    def wants_more(self) -> bool:
        """Whether the median may still get better."""
        taken = len(self.seconds)
        return taken < ROUNDS[0] or (taken < ROUNDS[1] and sum(self.seconds) < SECONDS_EACH)

    @property
    def median(self) -> float:
        """Of the turns so far, without the first."""
        return statistics.median(self.seconds[1:] or self.seconds)


def measure_kernels(
    backend: Backend,
    kernels: Iterable[Kernel],
    cache_bytes: int,
    progress: Progress | None = None,
) -> Iterator[Mapping[Kernel, float]]:
    """Measure kernels, those that fit into memory together in turns.

    Args:
        backend: What runs them.
        kernels: Which; each once.
        cache_bytes: What has to be read to make the caches forget.
        progress: Told after every group.

    Yields:
        Median seconds of the kernels of one group; those of roundings without the narrow product
        behind them. When the loop is interrupted, the kernels of the group that had their least
        number of turns are yielded before the interruption goes on.
    """
    wanted = list(dict.fromkeys(kernels))
    made_up, done = MadeUp(), 0
    for group in _groups(wanted):
        candidates = [one for several in group for one in _candidates(backend, several, made_up)]
        start = _start(backend, made_up)
        interruption = _take_turns([*candidates, *start], cache_bytes)
        yield _medians(candidates, start)
        if interruption is not None:
            raise interruption
        done += len(candidates)
        if progress is not None:
            progress(done, len(wanted))


def _groups(kernels: Sequence[Kernel]) -> Iterator[list[list[Kernel]]]:
    """Kernels with the same weights at several numbers of rows, as many as fit into memory."""
    alike: dict[Kernel, list[Kernel]] = {}
    for kernel in kernels:
        alike.setdefault(replace(kernel, rows=1), []).append(kernel)
    group: list[list[Kernel]] = []
    size = 0
    for first, several in alike.items():
        needed = first.weight_bytes * _copies(first)
        if group and size + needed > BATCH_BYTES:
            yield group
            group, size = [], 0
        group.append(several)
        size += needed
    if group:
        yield group


def _copies(kernel: Kernel) -> int:
    if kernel.kind.startswith("rounding"):
        return ROUNDINGS
    least, most = COPIES
    return max(least, min(most, COPY_BYTES // max(kernel.weight_bytes, 1)))


def _candidates(backend: Backend, kernels: Sequence[Kernel], made_up: MadeUp) -> list[Candidate]:
    """Kernels that differ in their rows only share an executable."""
    copies = _copies(kernels[0])
    executable = backend.lower(chain(kernels[0], copies, made_up))
    return [Candidate(one, _call(executable, one), copies) for one in kernels]


def _call(executable: Executable, kernel: Kernel) -> Callable[[], object]:
    shape, dtype = (kernel.rows, kernel.inputs), getattr(torch, kernel.dtype)
    values = [torch.randn(shape).to(dtype) for _ in executable.inputs]
    return executable.repeated(values)


def _start(backend: Backend, made_up: MadeUp) -> tuple[Candidate, Candidate]:
    """One copy of a kernel that takes next to nothing, and nine: what a call takes to start."""
    one, nine = (
        Candidate(_START, _call(backend.lower(chain(_START, n, made_up)), _START), n)
        for n in (1, 9)
    )
    return one, nine


def _take_turns(candidates: Sequence[Candidate], cache_bytes: int) -> KeyboardInterrupt | None:
    """A turn for each, again and again; gives an interruption that came late enough to use."""
    memory = np.zeros(2 * cache_bytes // 8, dtype=np.int64)
    waiting = list(candidates)
    try:
        while waiting:
            for lap in _laps(waiting):
                read = sum(one.kernel.weight_bytes * one.copies for one in lap)
                memory[: max(0, 2 * cache_bytes - read) // 8].sum()
                for one in lap:
                    one.turn()
            waiting = [one for one in waiting if one.wants_more]
    except KeyboardInterrupt as interruption:
        if all(len(one.seconds) >= ROUNDS[0] for one in candidates):
            return interruption
        raise
    return None


def _laps(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates of one number of rows each: those of one executable never follow each other."""
    rows = sorted({one.kernel.rows for one in candidates})
    return [[one for one in candidates if one.kernel.rows == count] for count in rows]


def _medians(
    candidates: Sequence[Candidate], start: tuple[Candidate, Candidate]
) -> Mapping[Kernel, float]:
    # The fastest turns: where others compute too, threads are woken late now and then.
    one, nine = (min(candidate.seconds) for candidate in start)
    before = max(0.0, one - (nine - one) / 8)
    # A call is never said to be nothing but its start.
    return {c.kernel: max(c.median - before, 0.2 * c.median) / c.copies for c in candidates}
