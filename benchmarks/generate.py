"""``python -m benchmarks.generate``: `generate` beside the bare steps it is made of.

Greedy, 64 tokens behind a prompt of 128, a Llama of 88 million random weights at 4 bits. Bare: the
same prompt and the same number of steps of the decoder, each with the token that was chosen given
before. The rest is the loop of transformers: arguments, masks, stopping, choosing.
"""

from __future__ import annotations

import argparse

import torch

import lamella
from benchmarks.decoders.candidate import Call, llama, prompt, token
from benchmarks.decoders.ours import quantized
from benchmarks.record import Result
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.threads import physical_cores
from lamella.ir.graph import Graph
from lamella.rewrite.incremental import incremental
from lamella.timing import measure

PAST, NEW = 128, 64
BLOCKS = (32, 128, 256)


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
        times = measure({"bare": bare(chosen), "generate": whole(chosen)}, rounds=options.rounds)
        steps, all_ = (times[name].median_seconds * 1e3 / NEW for name in ("bare", "generate"))
        least = times["generate"].best_seconds / times["bare"].best_seconds
        rows.append((f"4 bits, blocks of {block}", steps, all_, all_ / steps, least))
    result = Result(
        "generate",
        f"Milliseconds a token, prompt of {PAST} and {NEW} new tokens, greedy, batch 1",
        ("weights", "bare steps", "generate", "ratio", "ratio of the least"),
        rows,
        (f"Medians of {options.rounds} interleaved turns; both contain the prompt",),
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


if __name__ == "__main__":
    main()
