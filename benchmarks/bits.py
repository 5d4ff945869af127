"""Bit allocation on the trained language model: scores against uniform widths and random order.

``python -m benchmarks.bits [--rows 48] [--budgets 8 6 5 4 3]``
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoTokenizer

import lamella
from benchmarks.record import Result
from benchmarks.zoo.language_model import language_model, perplexity, windows
from lamella.ir.graph import Graph
from lamella.passes.sites import find_sites

logger = logging.getLogger(__name__)

BUDGETS = (8, 6, 5, 4, 3)
SCORES = ("fisher", "kl", "output-error", "weight-error", "lim", "zd", "size", "random")
RANDOM_SEEDS = (0, 1, 2)
BLOCK = 64
OVERHEAD = 16 / BLOCK
"""Bits per weight that the float16 scales add, in a uniform plan as in a mixed one."""


def calibration(rows: Tensor, batch: int = 8) -> Iterator[dict[str, Tensor]]:
    """Rows of tokens as the inputs of a causal language model."""
    for chunk in rows.split(batch):
        yield {"input_ids": chunk, "attention_mask": torch.ones_like(chunk)}


def main() -> None:
    """Compile at every budget with every score, and measure perplexity on unseen files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=48, help="rows of 256 tokens for the test")
    parser.add_argument("--samples", type=int, default=16, help="rows for calibration")
    parser.add_argument("--budgets", type=int, nargs="*", default=list(BUDGETS))
    parser.add_argument("--scores", nargs="*", default=list(SCORES))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = language_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    test = windows(tokenizer, "test", 256, options.rows)
    samples = list(calibration(windows(tokenizer, "calibration", 256, options.samples)))
    graph = lamella.capture(folder, samples[0])
    original = perplexity(graph, test)
    measured: list[tuple[object, ...]] = []
    for budget in options.budgets:
        measured.append(_uniform(graph, budget, test))
        for score in options.scores:
            seeds = RANDOM_SEEDS if score == "random" else (0,)
            for seed in seeds:
                measured.append(_allocated(graph, budget, score, seed, samples, test))
                logger.info("%s", measured[-1])
    whole = graph.weight_bytes() / 1e6
    Result(
        name="bits",
        title=(
            f"Perplexity of the trained language model ({whole:.3g} MB of weights, perplexity "
            f"{original:.4g} in fp32) on {test.numel()} unseen tokens"
        ),
        columns=("order", *(f"{budget} bits" for budget in options.budgets)),
        rows=table(measured, options.budgets),
        notes=(
            f"Blocks of {BLOCK} with float16 scales, {OVERHEAD} bits per weight on top in every "
            "row of a budget; mixed plans choose among 2, 4 and 8 bits (embedding, head at least "
            "4) and run with the 8-bit activations of the kernel.",
            "Uniform: every weight on the grid of that width, scales searched, activations "
            "not rounded; 3, 5 and 6 bits have no kernel and are a reference only.",
            f"Scores saw {options.samples} rows of 256 tokens of other files.",
        ),
    ).publish()


def table(measured: list[tuple[object, ...]], budgets: list[int]) -> list[tuple[object, ...]]:
    """A row for every order, a column for every budget, and the sizes in the first row."""
    sizes: dict[object, object] = {}
    found: dict[object, dict[object, object]] = {}
    for budget, order, size, reached, _ in measured:
        sizes.setdefault(budget, size)
        found.setdefault(order, {})[budget] = reached
    first = ("*MB, uniform*", *(sizes[budget] for budget in budgets))
    return [first, *((order, *(row[b] for b in budgets)) for order, row in found.items())]


def _uniform(graph: Graph, bits: int, test: Tensor) -> tuple[object, ...]:
    """All weights that a plan covers at one width, whether or not a kernel has it."""
    edited = graph.copy()
    started = time.perf_counter()
    sites = find_sites(edited)
    for site in sites:
        edited.set_weight(site.node, rounded(edited.weight(site.node), bits))
    seconds = time.perf_counter() - started
    covered = sum(site.size for site in sites)
    size = graph.weight_bytes() - 4 * covered + covered * (bits + OVERHEAD) / 8
    return (bits, "uniform", size / 1e6, perplexity(edited, test), seconds)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """`weight` on a symmetric grid of `bits` with the best of 21 scales for each block.

    Written apart from `lamella.ir.quantize`, which knows the widths of kernels only.
    """
    blocks = weight.unflatten(-1, (-1, BLOCK))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    best = torch.zeros_like(blocks)
    least = torch.full_like(largest, torch.inf)
    for step in range(21):
        scale = (largest / low * (1 - 0.02 * step)).half().float()
        scale = torch.where(scale == 0, 1.0, scale)
        tried = (blocks / scale).round().clamp(low, high) * scale
        error = (tried - blocks).square().sum(-1, keepdim=True)
        best = torch.where(error < least, tried, best)
        least = torch.minimum(error, least)
    return best.flatten(-2)


def _allocated(
    graph: Graph,
    budget: int,
    score: str,
    seed: int,
    samples: list[dict[str, Tensor]],
    test: Tensor,
) -> tuple[object, ...]:
    bits = budget + OVERHEAD
    allocate = f"allocate-bits budget={bits} by={score} block={BLOCK} seed={seed}"
    edited, seconds = _transformed(graph, [allocate, "quantize-weights"], samples)
    size = edited.weight_bytes() / 1e6
    label = f"random, seed {seed}" if score == "random" else score
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
