"""Calls of whole models, to be timed side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lamella.backends.base import Backend, Executable
from lamella.backends.decoder import Decoder
from lamella.backends.inputs import example_inputs
from lamella.errors import IncrementalError
from lamella.generation import GenerativeExecutable
from lamella.ir.graph import Graph
from lamella.passes.times import Workload
from lamella.rewrite.incremental import incremental
from lamella.timing import Timing, measure

STEPS = 12
"""Tokens that one timed call decodes, so that its start weighs little."""

Call = tuple[Callable[[], object], int]
"""What is timed, and how many calls of the model that is."""


def call_of_graph(graph: Graph, backend: Backend, workload: Workload) -> Call:
    """A call of a graph that is lowered for it.

    Raises:
        IncrementalError: The workload has a cache, and the graph can't continue from one.
        UnsupportedError: Some operators can't be lowered; all are listed.
    """
    if workload.past is None:
        return _plain(backend.lower(graph), workload)
    try:
        step = incremental(graph).step
    except IncrementalError as error:
        error.add_note("a time is predicted for a model as it generates")
        raise
    return _decoding(backend.decoder(step), workload)


def call_of_executable(executable: Executable, workload: Workload) -> Call | None:
    """A call of what was compiled; None where the workload has a cache and it has none."""
    if workload.past is None:
        return _plain(executable, workload)
    if not isinstance(executable, GenerativeExecutable):
        return None
    parts = executable.parts
    return _decoding(parts.step.decoder(parts.layout), workload)


def times_of(calls: Mapping[str, Call], rounds: int = 15) -> Mapping[str, Timing]:
    """Time one call of the model of each, in turns."""
    found = measure({name: run for name, (run, _) in calls.items()}, rounds=rounds)
    return {name: _each(timing, calls[name][1]) for name, timing in found.items()}


def _plain(executable: Executable, workload: Workload) -> Call:
    sizes = {"batch": workload.batch, "sequence": workload.tokens}
    values: Any = example_inputs(executable.inputs, **sizes)
    return (lambda: executable.run(values)), 1


def _decoding(decoder: Decoder, workload: Workload) -> Call:
    batch, past = workload.batch, workload.past
    prompt = torch.ones(batch, past or workload.tokens, dtype=torch.int64)
    if not past:
        return (
            lambda: decoder.step(decoder.start(batch, workload.tokens), prompt, last_only=True)
        ), 1
    state = decoder.start(batch, past + 2 * STEPS)
    decoder.step(state, prompt, last_only=True)
    new = torch.ones(batch, workload.tokens, dtype=torch.int64)
    # A recurrence can't go back, and does not get longer either.
    can_go_back = all(slot.grows for slot in decoder.layout.slots)

    def decode() -> None:
        for _ in range(STEPS):
            decoder.step(state, new)
        if can_go_back:
            state.crop(past)

    return decode, STEPS


def _each(timing: Timing, calls: int) -> Timing:
    return Timing(
        timing.median_seconds / calls,
        timing.best_seconds / calls,
        timing.spread_ratio,
        timing.rounds,
    )
