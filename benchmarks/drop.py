"""Dropped layers are really gone: operators, bytes and latency on every backend.

``python -m benchmarks.drop``
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from transformers import AutoTokenizer

import lamella
from benchmarks.bits import calibration
from benchmarks.record import Result
from benchmarks.zoo.language_model import language_model, perplexity, windows
from lamella.timing import measure

RECIPES = {
    "as trained": [],
    "drop-blocks count=3": ["drop-blocks count=3 by=similarity"],
    "drop-blocks count=6": ["drop-blocks count=6 by=similarity"],
    "drop-sublayers, 6 attentions": ["drop-sublayers count=6 kinds=attention by=similarity"],
    "drop-sublayers, 6 mlps": ["drop-sublayers count=6 kinds=mlp by=similarity"],
}


def main() -> None:
    """Drop, lower to both backends, and time everything in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    folder = language_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    test = windows(tokenizer, "test", 256, 32)
    samples = list(calibration(windows(tokenizer, "calibration", 256, 16)))
    captured = lamella.capture(folder, samples[0])
    inputs = {"input_ids": test[:1, :128], "attention_mask": torch.ones_like(test[:1, :128])}
    graphs = {}
    for name, passes in RECIPES.items():
        graphs[name] = captured.copy()
        lamella.transform(graphs[name], passes, samples=samples)
    candidates = {
        (name, backend): partial(lamella.lower(graph, backend), **inputs)
        for name, graph in graphs.items()
        for backend in ("eager", "onnxruntime")
    }
    timings = measure(
        {" / ".join(key): call for key, call in candidates.items()}, rounds=options.rounds
    )
    rows = []
    for name, graph in graphs.items():
        eager, ort = (
            timings[f"{name} / {backend}"].median_seconds for backend in ("eager", "onnxruntime")
        )
        calls = sum(node.op == "call_function" for node in graph.nodes)
        size = graph.weight_bytes() / 1e6
        rows.append((name, calls, size, perplexity(graph, test), eager * 1e3, ort * 1e3))
    Result(
        name="drop",
        title="Layers dropped from the trained language model, batch 1 x 128 tokens",
        columns=("passes", "operators", "MB", "perplexity", "eager ms", "onnxruntime ms"),
        rows=rows,
        notes=("Medians of interleaved runs. No retraining.",),
    ).publish()


if __name__ == "__main__":
    main()
