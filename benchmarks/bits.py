"""Bit allocation on the trained language model: scores against uniform widths and random order.

``python -m benchmarks.bits [--rows 48] [--budgets 8 6 5 4 3]``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from torch import Tensor

import lamella
from benchmarks.record import Result
from benchmarks.zoo.language_model import language_model, perplexity, windows
from lamella.api import load_tokenizer
from lamella.ir.graph import Graph

BUDGETS = (8.0, 6.0, 5.0, 4.0, 3.0)
SCORES = ("fisher", "kl", "output-error", "weight-error", "lim", "zd", "size", "random")
RANDOM_SEEDS = (0, 1, 2)
UNIFORM = {8.0: 8, 4.0: 4}


def calibration(rows: Tensor, batch: int = 8) -> Iterator[dict[str, Tensor]]:
    """Rows of tokens as the inputs of a causal language model."""
    for chunk in rows.split(batch):
        yield {"input_ids": chunk, "attention_mask": torch.ones_like(chunk)}


def main() -> None:
    """Compile at every budget with every score, and measure perplexity on unseen files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=48, help="rows of 256 tokens for the test")
    parser.add_argument("--samples", type=int, default=16, help="rows for calibration")
    parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS))
    parser.add_argument("--scores", nargs="*", default=list(SCORES))
    options = parser.parse_args()
    folder = language_model()
    tokenizer = load_tokenizer(folder)
    test = windows(tokenizer, "test", 256, options.rows)
    samples = list(calibration(windows(tokenizer, "calibration", 256, options.samples)))
    graph = lamella.capture(folder, samples[0])
    original = perplexity(graph, test)
    rows: list[tuple[object, ...]] = [
        ("fp32", "", graph.weight_bytes() / 1e6, original, 0.0),
    ]
    for budget in options.budgets:
        if budget in UNIFORM:
            rows.append(_uniform(graph, UNIFORM[budget], samples, test))
        for score in options.scores:
            seeds = RANDOM_SEEDS if score == "random" else (None,)
            rows += [_allocated(graph, budget, score, seed, samples, test) for seed in seeds]
    Result(
        name="bits",
        title=f"Perplexity of the trained language model on {test.numel()} unseen tokens",
        columns=("bits per weight", "order", "weights in MB", "perplexity", "seconds"),
        rows=rows,
        notes=(
            "Bits per weight count scales and zero points; choices 2, 4 and 8 bits; 8-bit "
            "activations inside the kernel are emulated.",
            f"Scores saw {len(samples) * 8} other rows of 256 tokens.",
        ),
    ).publish()


def _uniform(
    graph: Graph, bits: int, samples: list[dict[str, Tensor]], test: Tensor
) -> tuple[object, ...]:
    edited, seconds = _transformed(graph, [f"quantize-weights bits={bits} block=64"], samples)
    size = edited.weight_bytes() / 1e6
    return (f"uniform {bits}", "", size, perplexity(edited, test), seconds)


def _allocated(
    graph: Graph,
    budget: float,
    score: str,
    seed: int | None,
    samples: list[dict[str, Tensor]],
    test: Tensor,
) -> tuple[object, ...]:
    by = score if seed is None else f"{score}:seed={seed}"
    passes = [f"allocate-bits budget={budget} by={by}", "quantize-weights"]
    edited, seconds = _transformed(graph, passes, samples)
    size = edited.weight_bytes() / 1e6
    label = score if seed is None else f"{score}, seed {seed}"
    return (budget, label, size, perplexity(edited, test), seconds)


def _transformed(
    graph: Graph, passes: list[str], samples: list[dict[str, Tensor]]
) -> tuple[Graph, float]:
    edited = graph.copy()
    started = time.perf_counter()
    lamella.transform(edited, passes, samples=samples)
    return edited, time.perf_counter() - started


if __name__ == "__main__":
    main()
