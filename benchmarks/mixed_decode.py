"""``python -m benchmarks.mixed_decode``: mixed plans of 4.25 bits beside 4 bits in blocks of 32.

Milliseconds a token behind 128 others, and the divergence from the unchanged model on unseen
tokens, for the trained language model and for one of 88 million random weights. ``--part loss``
and ``--part time`` do one of the two; time alone needs the machine for itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

import lamella
from benchmarks.decoders.candidate import STEPS, llama
from benchmarks.decoders.ours import candidate
from benchmarks.record import RESULTS, Result
from benchmarks.scores.cases import outputs
from benchmarks.zoo.language_model import language_model, windows
from lamella import api
from lamella.data import Batch
from lamella.ir.graph import Graph
from lamella.passes.scores.target import loss_target
from lamella.timing import measure

BLOCKS = "2/64,2/128,4/32,4/64,4/128,8/64,8/128"
MIXED = f"allocate-bits budget=4.25 choices={BLOCKS} embedding_min=4 min_size=0"
PASSES = {
    "4 bits, blocks of 32": ("quantize-weights bits=4 block=32 min_size=0",),
    "4 bits, blocks of 32, gptq": ("quantize-weights bits=4 block=32 min_size=0 method=gptq",),
    "4.25 bits mixed": (MIXED, "quantize-weights"),
    "4.25 bits mixed, gptq": (MIXED, "quantize-weights method=gptq"),
}
PAST, ROUNDS = 128, 40
KEPT = RESULTS / "mixed_decode_loss.json"


def trained() -> tuple[Graph, list[Batch], list[Batch]]:
    """The trained language model with what is seen and unseen."""
    source = api.read(language_model())
    seen, unseen = (
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows.split(8)]
        for rows in (
            windows(source.tokenizer, "calibration", 128, 32),
            windows(source.tokenizer, "test", 128, 32),
        )
    )
    return source.graph, seen, unseen


def random() -> tuple[Graph, list[Batch], list[Batch]]:
    """88 million random weights and random tokens."""
    graph = lamella.capture(llama())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(8192, (12, 64), generator=generator)
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows.split(4)]
    return graph, batches[:2], batches[2:]


MODELS: dict[str, Callable[[], tuple[Graph, list[Batch], list[Batch]]]] = {
    "trained, 10 M": trained,
    "random, 88 M": random,
}


def main() -> None:
    """Quantize, measure, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("loss", "time"))
    parser.add_argument("--plans", type=Path, default=Path(".cache/mixed_decode"))
    options = parser.parse_args()
    if options.part != "time":
        KEPT.write_text(json.dumps({n: losses(n, options.plans) for n in MODELS}, indent=1) + "\n")
    if options.part != "loss":
        publish(options.plans)


def losses(name: str, folder: Path) -> dict[str, float]:
    """The divergence of each candidate; what they are is kept in `folder`."""
    graph, seen, unseen = MODELS[name]()
    target, reference = loss_target(graph), outputs(graph, unseen)
    found: dict[str, float] = {}
    for label, passes in PASSES.items():
        edited = graph.copy()
        lamella.transform(edited, passes, samples=seen)
        lamella.lower(edited, "eager").save(folder / f"{name}, {label}")
        rows = zip(reference, outputs(edited, unseen), strict=True)
        total = sum(target.loss(one, two) for one, two in rows)
        found[label] = total / sum(len(one) for one in reference)
    return found


def publish(folder: Path) -> None:
    """Time the steps in turns, and publish them with the losses."""
    kept = json.loads(KEPT.read_text())
    rows: list[tuple[object, ...]] = []
    for name, make in MODELS.items():
        graph, *_ = make()
        calls, bits = {}, {}
        for label in PASSES:
            plan = lamella.load(folder / f"{name}, {label}").plan
            assert plan is not None
            edited = graph.copy()
            edited.plan = plan.formats
            # Time does not hang on how the codes were found.
            lamella.transform(edited, ["quantize-weights"])
            entries = sum(shape[0] * shape[1] for shape in (e.shape for e in plan.entries.values()))
            bits[label] = 8 * plan.bytes / entries
            calls[label] = candidate(label, edited, 512).decode(PAST)
        timings = measure(calls, rounds=ROUNDS)
        rows += [
            (name, label, bits[label], timings[label].median_seconds * 1e3 / STEPS, loss)
            for label, loss in kept[name].items()
        ]
    Result(
        "mixed_decode",
        f"One token behind {PAST}, medians of {ROUNDS} interleaved turns of {STEPS} tokens",
        ("model", "plan", "bits a weight, with scales", "ms", "KL on unseen tokens"),
        rows,
        (
            f"Mixed: {MIXED}; gptq: {PASSES['4.25 bits mixed, gptq'][1]}.",
            "The losses of random weights say only how much is rounded.",
        ),
    ).publish()


if __name__ == "__main__":
    main()
