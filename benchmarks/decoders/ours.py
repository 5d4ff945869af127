"""Our decoder at every format; weights are rounded to the nearest code."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.decoders.candidate import STEPS, Call, Candidate, prompt, token
from lamella.backends.decoder import Decoder
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.ir.graph import Graph
from lamella.passes.base import Analyses
from lamella.passes.transforms.allocate_bits import AllocateBits
from lamella.passes.transforms.quantize_cache import QuantizeCache
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from lamella.rewrite.incremental import incremental

FORMATS = ((32, 0), (8, 128), (4, 32), (4, 128), (4, 256))
"""Bits and block."""
MIXED = "5"
"""Bits per weight of the mixed plan, by the error of the weights."""


def quantized(graph: Graph, bits: int, block: int, activations: str = "none") -> Graph:
    """A copy with every linear layer at `bits`."""
    chosen = graph.copy()
    pass_ = QuantizeWeights(bits=bits, block=block, activations=activations)
    pass_.run(chosen, Analyses(chosen))
    chosen.finish()
    return chosen


def with_codes(graph: Graph) -> Graph:
    """A copy whose cache holds codes of 8 bits; the scales are those of a few random prompts."""
    chosen = graph.copy()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1000, (4, 128), generator=generator)
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows.split(1)]
    QuantizeCache().run(chosen, Analyses(chosen, samples))
    chosen.finish()
    return chosen


def mixed(graph: Graph) -> Graph:
    """A copy with a width for each layer."""
    chosen = graph.copy()
    analyses = Analyses(chosen)
    AllocateBits(budget=MIXED, by="weight-error", block=128).run(chosen, analyses)
    QuantizeWeights(block=128).run(chosen, analyses)
    chosen.finish()
    return chosen


def ours(graph: Graph, capacity: int) -> Iterator[Candidate]:
    """One after the other."""
    for bits, block in FORMATS:
        if bits == 32:
            yield candidate("lamella, 32 bits", graph, capacity)
        else:
            name = f"lamella, {bits} bits, blocks of {block}"
            yield candidate(name, quantized(graph, bits, block), capacity)
    coded = quantized(with_codes(graph), 4, 256)
    yield candidate("lamella, 4 bits, blocks of 256, 8-bit cache", coded, capacity)
    integers = quantized(graph, 8, 128, "int8-tensor")
    yield candidate("lamella, 8 bits, 8-bit activations", integers, capacity)
    yield candidate(f"lamella, {MIXED} bits mixed", mixed(graph), capacity)


def candidate(name: str, graph: Graph, capacity: int) -> Candidate:
    """The decoder of a graph without a cache, with its caches bound."""
    step = incremental(graph).step
    decoder = OnnxRuntimeBackend().decoder(step)

    def decode(past: int) -> Call:
        state = decoder.start(1, capacity)
        decoder.step(state, prompt(past), last_only=True)
        new = token()

        def call() -> None:
            for _ in range(STEPS):
                decoder.step(state, new)
                state.crop(past)

        return call

    return Candidate(name, _read_bytes(step), decode, lambda tokens: _prefill(decoder, tokens))


def _prefill(decoder: Decoder, tokens: int) -> Call:
    state, ids = decoder.start(1, tokens), prompt(tokens)

    def call() -> None:
        decoder.step(state, ids, last_only=True)
        state.crop(0)

    return call


def _read_bytes(step: Graph) -> int:
    """All weights but a table of embeddings that nothing else reads."""
    tables = [
        node
        for node in step.nodes
        if node.op == "get_attr" and all("embedding" in str(user.target) for user in node.users)
    ]
    values = [node.meta["val"] for node in tables]
    return step.weight_bytes() - sum(value.numel() * value.element_size() for value in values)
