"""A 70-billion-parameter Llama from its config: capture, cost and text, in time and memory.

    python -m benchmarks.big_model [--blocks 80]

Every figure is of one fresh process: each step adds to the time, and memory is the peak of the
process so far. No weight is ever made.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.record import Result

LIMIT_SECONDS = 90
LIMIT_BYTES = 2 * 10**9


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in a process of its own, and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=80)
    blocks: int = parser.parse_args(arguments).blocks
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rows = pool.apply(measure, (blocks,))
    seconds, cpu, peak = rows[-1][1:4]
    fits = seconds <= LIMIT_SECONDS and peak * 1e6 <= LIMIT_BYTES
    Result(
        name="big_model",
        title=f"Llama of {blocks} blocks, 8192 wide, captured from its config",
        columns=("after", "seconds", "CPU seconds", "peak MB", "what"),
        rows=rows,
        notes=(
            f"{seconds} s ({cpu} s of CPU) and {peak} MB, "
            f"{'within' if fits else 'beyond'} {LIMIT_SECONDS} s and {LIMIT_BYTES // 10**6} MB",
        ),
    ).publish()


def measure(blocks: int) -> list[tuple[Any, ...]]:
    """A row for every step: seconds since the start, CPU seconds, peak memory, what came of it."""
    start, cpu = time.perf_counter(), time.process_time()
    rows: list[tuple[Any, ...]] = []

    def done(step: str, what: str) -> None:
        seconds, spent = time.perf_counter() - start, time.process_time() - cpu
        # Linux counts in kibibytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        rows.append((step, round(seconds, 1), round(spent, 1), round(peak), what))

    import torch
    from transformers import LlamaConfig

    from lamella.ir.meta import capture_config
    from lamella.passes.analyses.cost import cost_of
    from lamella.rewrite.canonicalize import canonicalize

    done("import", f"torch {torch.__version__}")
    config = LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=blocks,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )
    graph = capture_config(config, task_class="LlamaForCausalLM")
    done("capture", f"{len(graph.nodes)} nodes, {graph.weight_bytes() / 2e9:.2f} billion weights")
    canonicalize(graph)
    done("canonicalize", f"{len(graph.nodes)} nodes, {len(graph.blocks)} blocks")
    at = cost_of(graph).at(batch=1, sequence=4096)
    done(
        "cost",
        f"4096 tokens: {at.total.flops / 1e12:.0f} Tflop, "
        f"{at.total.stored_bytes / 1e9:.1f} GB of weights, "
        f"{at.total.cache_bytes / 1e9:.2f} GB of cache",
    )
    done("text", f"{len(str(graph).splitlines())} lines")
    return rows


if __name__ == "__main__":
    main()
