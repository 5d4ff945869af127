"""The memory that quantizing a model takes, for random Llamas of some widths and depths.

    python -m benchmarks.quantize_memory [--cases 768x12 1024x31] [--runs 3] [--ways in-use default]
        [--anew] [--record]

Each run is a process of its own, which makes the model, captures it, and forgets how much memory
that took (``/proc/self/clear_refs``, Linux). The peak is the most resident memory from there to
the end of the quantization, beyond what was resident before and the codes of all blocks, which
the result holds. Runs pile up in a file, and the table has all of them. Resident memory is what
is in use, and what the allocator of the C library has not given back: pieces of up to 32 MB are
kept for later, as many as happen to lie below others.
Therefore half of the runs have ``MALLOC_MMAP_THRESHOLD_``, with which every tensor of more than
64 kB is given back when it is freed: the peak is then the memory in use.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lamella
from benchmarks.record import Result
from lamella.data import Samples
from lamella.passes.base import Analyses
from lamella.passes.transforms.quantize_weights import QuantizeWeights

CASES = ("768x3", "768x12", "1024x6", "1024x31")
"""Width x blocks; 768x12 has 88 million weights, 1024x31 has 357."""

KEPT = Path(".cache/quantize_memory.json")
WAYS: dict[str, dict[str, str]] = {
    "in-use": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    "default": {},
}
"""Which variables a process has."""

KEPT = Path(".cache/quantize_memory.json")
WAYS: dict[str, dict[str, str]] = {
    "in-use": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    "default": {},
}
"""Which variables a process has."""

ROWS, TOKENS, BATCHES = 4, 128, 2
OPTIONS: dict[str, Any] = {
    "bits": 4,
    "min_size": 0,
    "method": "quantease",
    "refits": 1,
    "sweeps": 1,
}
"""Every step of the method once or twice: more of them take time, and no memory."""


def llama(width: int, blocks: int) -> LlamaForCausalLM:
    """Random weights: heads of 64 over a third or a quarter for keys, an MLP 8/3 as wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Measured:
    """What one run took, in millions of weights, MB and seconds.

    Attributes:
        weights: Of the model.
        codes: With scales, of all blocks.
        peak: Beyond the loaded model and the codes.
        seconds: Of the quantization.
    """

    weights: float
    codes: float
    peak: float
    seconds: float


def measure(case: str, options: dict[str, Any]) -> Measured:
    """For a process of its own."""
    width, blocks = map(int, case.split("x"))
    model = llama(width, blocks)
    weights = sum(parameter.numel() for parameter in model.parameters())
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(8192, (ROWS, TOKENS), generator=generator) for _ in range(BATCHES)]
    batches = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in draws]
    graph = lamella.capture(model, batches[0])
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _status("VmRSS"), time.perf_counter()
    QuantizeWeights(**options).run(graph, Analyses(graph, Samples.of(batches)))
    seconds, peak = time.perf_counter() - started, _status("VmHWM") - before
    names = ("_packed", "_scales", "_zeros")
    stored = [graph.weight(n) for n in graph.weight_nodes() if str(n.target).endswith(names)]
    codes = sum(tensor.nbytes for tensor in stored) / 1e6
    return Measured(weights / 1e6, codes, peak - codes, seconds)


def run(case: str, environment: Mapping[str, str]) -> Measured:
    """One process."""
    with _environment(environment), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (case, OPTIONS))


def row(case: str, back: Sequence[Measured], kept: Sequence[Measured]) -> list[Any]:
    """One row of the table, from runs that give memory back and others."""
    width, blocks = case.split("x")
    return [
        f"{width} wide, {blocks} blocks",
        round(back[0].weights),
        round(4 * back[0].weights),
        round(back[0].codes),
        _median([one.peak for one in back]),
        _median([one.peak for one in kept]),
        round(min(one.seconds for one in (*back, *kept))),
    ]


def _median(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.0f} of {len(values)} ({min(values):.0f}-{max(values):.0f})"


@contextmanager
def _environment(given: Mapping[str, str]) -> Generator[None]:
    """Variables for processes that start meanwhile; the C library reads them when one starts."""
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _status(field: str) -> float:
    """Megabytes of this process, of one line of ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no line {field}")


def main() -> None:
    """Measure each case in a process of its own; show or record the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), metavar="WIDTHxBLOCKS")
    parser.add_argument("--runs", type=int, default=3, help="of each kind")
    parser.add_argument("--record", action="store_true", help="write the table of results")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--anew", action="store_true", help="forget the runs of before")
    options = parser.parse_args()
    if options.anew:
        KEPT.unlink(missing_ok=True)
    for case, way in product(options.cases, options.ways * options.runs):
        one = run(case, WAYS[way])
        found = kept_runs()
        found.setdefault(f"{case} {way}", []).append(asdict(one))
        KEPT.write_text(json.dumps(found))
        print(case, way, one, flush=True)
    found = kept_runs()
    result = table({name: [Measured(**one) for one in several] for name, several in found.items()})
    result.publish() if options.record else result.show()


def kept_runs() -> dict[str, list[dict[str, float]]]:
    """Case and way -> the runs so far."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def table(runs: Mapping[str, Sequence[Measured]]) -> Result:
    """All cases that ran."""
    pairs = [(case, *(runs.get(f"{case} {way}", ()) for way in WAYS)) for case in CASES]
    listed = " ".join(f"{name}={value}" for name, value in OPTIONS.items())
    return Result(
        name="quantize_memory",
        title="Memory of quantizing random Llamas, MB",
        columns=(
            "model",
            "million weights",
            "dense weights",
            "codes",
            "peak in use beyond model and codes",
            "the same, with what the allocator keeps",
            "seconds",
        ),
        rows=[row(case, back, kept) for case, back, kept in pairs if back],
        notes=(
            f"quantize-weights {listed}; {BATCHES} samples of {ROWS} x {TOKENS} tokens. Most "
            "resident memory of the process while it quantizes, less that of the process with the "
            "model loaded, less the codes. The embedding and the head (8192 rows) are quantized "
            "too.",
            "Median of so many processes (least-most). In use: with "
            "MALLOC_MMAP_THRESHOLD_=65536, with which freed tensors go back at once; beside it as "
            "the C library does it by default. Seconds: the least, beside other work.",
        ),
    )


if __name__ == "__main__":
    main()
