"""From a loaded model to a session that generates: where the time goes, and how it grows.

``python -m benchmarks.compile_time [--blocks 12 24 48]``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lamella
from benchmarks.record import Result
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.generation import lower
from lamella.ir.capture import capture_module
from lamella.ir.huggingface import origin_of
from lamella.rewrite.canonicalize import canonicalize
from lamella.rewrite.incremental import incremental
from lamella.rewrite.incremental.check import check_steps


def main() -> None:
    """Compile models of several depths, step by step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="*", default=[12, 24, 48])
    options = parser.parse_args()
    rows = [_measured(blocks) for blocks in options.blocks]
    Result(
        name="compile_time",
        title="Seconds from a loaded Llama (768 wide) to a session that generates, 4 bits",
        columns=("blocks", "capture", "canonicalize", "quantize", "lower", "all", "cache", "check"),
        rows=rows,
        notes=(
            "quantize: `quantize-weights bits=4 block=32` with the checks of the manager. lower: "
            "making and checking the graph with a cache, writing it, loading it, the first token; "
            "of that, measured once more: cache, making the graph, and check, reading 7 tokens at "
            "once and in chunks.",
        ),
    ).publish()


def _measured(blocks: int) -> tuple[object, ...]:
    seconds: list[float] = []

    @contextmanager
    def timed() -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds.append(time.perf_counter() - started)

    model, inputs = _model(blocks)
    with timed():
        graph = capture_module(model, inputs, origin=origin_of(model))
    with timed():
        canonicalize(graph)
    with timed():
        lamella.transform(graph, ["quantize-weights bits=4 block=32"])
    with timed():
        executable = lower(graph, OnnxRuntimeBackend())
        executable.generate(input_ids=inputs["input_ids"][:1], max_new_tokens=1)
    whole = sum(seconds)
    with timed():
        parts = incremental(graph)
    with timed():
        check_steps(graph, parts.step, parts.once)
    return (blocks, *seconds[:4], whole, *seconds[4:])


def _model(blocks: int) -> tuple[LlamaForCausalLM, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=blocks,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    tokens = torch.randint(3, 8192, (2, 7))
    return LlamaForCausalLM(config).eval(), {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
    }


if __name__ == "__main__":
    main()
