"""``python -m benchmarks.kv_cache``: a cache of 8-bit codes beside one of float32.

Bytes that a token takes, milliseconds a token behind 128 and 960 others with weights of 4 bits
in blocks of 32, and the divergence from the unchanged model on unseen tokens with weights as they
are, for the trained language model and for one of 88 million random weights. The candidates take
turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import lamella
from benchmarks.decoders.candidate import STEPS
from benchmarks.decoders.ours import candidate
from benchmarks.mixed_decode import MODELS
from benchmarks.record import Result
from benchmarks.scores.cases import outputs
from lamella.data import Batch
from lamella.ir.graph import Graph
from lamella.passes.scores.target import loss_target
from lamella.rewrite.incremental import incremental
from lamella.timing import measure

CACHES: dict[str, list[str]] = {"float32": [], "8-bit codes": ["quantize-cache"]}
WEIGHTS = "quantize-weights bits=4 block=32 min_size=0"
PASTS = (128, 960)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--record", action="store_true", help="write the table of results")
    options = parser.parse_args()
    result = Result(
        "kv_cache",
        f"Batch 1, medians of {options.rounds} interleaved turns of {STEPS} tokens",
        ("model", "cache", "bytes a token", *(f"ms at {past}" for past in PASTS), "KL"),
        [row for name in MODELS for row in _rows(name, options.rounds)],
        (
            "Milliseconds with weights of 4 bits in blocks of 32, in ONNX Runtime; KL of the "
            "cache alone, on unseen tokens. That of random weights says only how much is rounded",
        ),
    )
    result.publish() if options.record else result.show()


def _rows(name: str, rounds: int) -> Iterator[tuple[object, ...]]:
    graph, seen, unseen = MODELS[name]()
    edited = {cache: _edited(graph, passes, seen) for cache, passes in CACHES.items()}
    light = {cache: _edited(one, [WEIGHTS], seen) for cache, one in edited.items()}
    capacity = PASTS[-1] + 2 * STEPS
    made = {cache: candidate(cache, one, capacity) for cache, one in light.items()}
    times = {
        past: measure({c: one.decode(past) for c, one in made.items()}, rounds=rounds)
        for past in PASTS
    }
    for cache, one in edited.items():
        steps = (times[past][cache].median_seconds * 1e3 / STEPS for past in PASTS)
        yield name, cache, _bytes_a_token(one), *steps, _loss(graph, one, unseen)


def _edited(graph: Graph, passes: list[str], samples: list[Batch]) -> Graph:
    chosen = graph.copy()
    lamella.transform(chosen, passes, samples=samples)
    return chosen


def _bytes_a_token(graph: Graph) -> int:
    layout = incremental(graph).step.cache
    assert layout is not None
    sizes = {"float32": 4, "int8": 1}
    return sum(sizes[slot.dtype] * slot.shape[0] * slot.shape[2] for slot in layout.slots)


def _loss(graph: Graph, edited: Graph, unseen: list[Batch]) -> float:
    target, reference = loss_target(graph), outputs(graph, unseen)
    rows = zip(reference, outputs(edited, unseen), strict=True)
    return sum(target.loss(one, two) for one, two in rows) / sum(len(one) for one in reference)


if __name__ == "__main__":
    main()
