"""The memory that quantizing a model takes, for random Llamas of some widths and depths.

    python -m benchmarks.quantize_memory [--cases 768x12 1024x31] [--record]

Each case is a process of its own, which makes the model, captures it, and forgets how much memory
that took (``/proc/self/clear_refs``, Linux). The peak is the most resident memory from there to
the end of the quantization, beyond what was resident before: codes of all blocks pile up in it,
and the dense weights, which the caller holds, do not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
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

ROWS, TOKENS, BATCHES = 4, 128, 2
OPTIONS: dict[str, Any] = {
    "bits": 4,
    "min_size": 0,
    "method": "quantease",
    "refits": 1,
    "sweeps": 2,
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


def measure(case: str, options: dict[str, Any]) -> list[Any]:
    """One row of the table; for a process of its own."""
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
    return [
        f"{width} wide, {blocks} blocks",
        round(weights / 1e6),
        round(4 * weights / 1e6),
        round(codes),
        round(peak),
        round(peak - codes),
        round(seconds),
    ]


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
    parser.add_argument("--record", action="store_true", help="write the table of results")
    options = parser.parse_args()
    rows: list[list[Any]] = []
    for case in options.cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (case, OPTIONS)))
        print(*rows[-1], flush=True)
    listed = " ".join(f"{name}={value}" for name, value in OPTIONS.items())
    result = Result(
        name="quantize_memory",
        title="Memory of quantizing random Llamas, MB",
        columns=(
            "model",
            "million weights",
            "dense weights",
            "codes",
            "peak beyond the loaded model",
            "of it not codes",
            "seconds",
        ),
        rows=rows,
        notes=(
            f"quantize-weights {listed}; {BATCHES} samples of {ROWS} x {TOKENS} tokens. Most "
            "resident memory of the process while it quantizes, less that of the process with the "
            "model loaded. The embedding and the head are quantized too.",
            "Each case ran once; seconds are beside other work.",
        ),
    )
    result.publish() if options.record else result.show()


if __name__ == "__main__":
    main()
