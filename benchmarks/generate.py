"""``python -m benchmarks.generate``: `generate` beside the bare steps it is made of.

Greedy, 64 tokens behind a prompt of 128, a Llama of 88 million random weights at 4 bits. Bare: the
same prompt and the same number of steps of the decoder, each with the token that was chosen given
before. Where the time of `generate` goes is measured by clocks around the session, the step and
the call of the model; the rest is the loop of transformers: arguments, masks, stopping, choosing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import lamella
from benchmarks.decoders.candidate import Call, llama, prompt, token
from benchmarks.decoders.ours import quantized
from benchmarks.record import Result
from lamella.backends.decoder import Decoder
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.session import Bound
from lamella.backends.onnxruntime.threads import physical_cores
from lamella.generation.model import GenerativeExecutable
from lamella.ir.graph import Graph
from lamella.rewrite.incremental import incremental
from lamella.timing import measure

PAST, NEW = 128, 64
BLOCKS = (32, 128, 256)
CLOCKS: tuple[tuple[type[Any], str], ...] = (
    (Bound, "run"),
    (Decoder, "step"),
    (GenerativeExecutable, "forward"),
)
"""Each is called by the next one."""


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--record", action="store_true", help="write the table of results")
    options = parser.parse_args()
    torch.set_num_threads(physical_cores())
    model = llama()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    graph = lamella.capture(model)
    rows: list[tuple[object, ...]] = []
    for block in BLOCKS:
        chosen = quantized(graph, 4, block)
        calls = {"bare": bare(chosen), "generate": whole(chosen)}
        times = measure(calls, rounds=options.rounds)
        steps, all_ = (times[name].median_seconds * 1e3 / NEW for name in calls)
        spent = shares(calls["generate"], options.rounds)
        rows.append((f"4 bits, blocks of {block}", steps, all_, all_ / steps, *spent))
    result = Result(
        "generate",
        f"Milliseconds a token, prompt of {PAST} and {NEW} new tokens, greedy, batch 1",
        ("weights", "bare steps", "generate", "ratio", "session", "step", "call", "loop"),
        rows,
        (
            f"Medians of {options.rounds} interleaved turns; both contain the prompt. The rest is "
            "where generate spends its time, each without the one before it: the session of ONNX "
            "Runtime, `Decoder.step`, the call of the model, the loop of transformers",
        ),
    )
    result.publish() if options.record else result.show()


def bare(graph: Graph) -> Call:
    """The prompt, then one step after the other."""
    decoder, new = OnnxRuntimeBackend().decoder(incremental(graph).step), token()

    def call() -> None:
        state = decoder.start(1, PAST + NEW)
        decoder.step(state, prompt(PAST), last_only=True)
        for _ in range(NEW - 1):
            decoder.step(state, new)

    return call


def whole(graph: Graph) -> Call:
    """`generate` of the executable."""
    compiled, ids = lamella.lower(graph, "onnxruntime"), prompt(PAST)
    return lambda: compiled.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)


def shares(call: Call, rounds: int) -> list[float]:
    """Median milliseconds a token in each of `CLOCKS` and in the rest, without what it calls."""
    found: list[list[float]] = []
    with clocks() as spent:
        for _ in range(rounds):
            spent[:] = [0.0] * len(CLOCKS)
            start = time.perf_counter()
            call()
            within = [0.0, *spent, time.perf_counter() - start]
            found.append([b - a for a, b in itertools.pairwise(within)])
    return [statistics.median(column) * 1e3 / NEW for column in zip(*found, strict=True)]


@contextmanager
def clocks() -> Iterator[list[float]]:
    """Seconds spent in each of `CLOCKS`, added up."""
    spent, before = [0.0] * len(CLOCKS), [vars(owner)[name] for owner, name in CLOCKS]

    def timed(place: int, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent[place] += time.perf_counter() - start

        return call

    try:
        for place, (owner, name) in enumerate(CLOCKS):
            setattr(owner, name, timed(place, before[place]))
        yield spent
    finally:
        for (owner, name), method in zip(CLOCKS, before, strict=True):
            setattr(owner, name, method)


if __name__ == "__main__":
    main()
