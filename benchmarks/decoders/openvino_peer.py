"""OpenVINO with 4-bit weights, driven in a process of its own (see `openvino_decoder`)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.decoders.candidate import STEPS, Call, Candidate
from lamella.backends.onnxruntime.emission import Caches
from lamella.backends.onnxruntime.files import MODEL, save_model
from lamella.backends.onnxruntime.threads import physical_cores
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.ir.graph import Graph
from lamella.rewrite.incremental import incremental

BLOCK = 128


def openvino(python: str, graph: Graph, folder: Path) -> Candidate | str:
    """Our cached graph in standard operators, its weights compressed by NNCF; or its name."""
    name = f"OpenVINO, int4 (NNCF), blocks of {BLOCK}"
    step = incremental(graph).step
    assert step.cache is not None
    folder.mkdir()
    save_model(write_onnx(step, opset=21, contrib=False, caches=Caches.PLAIN), folder)
    worker = Path(__file__).with_name("openvino_decoder.py")
    pairs = [f"{slot.input}={slot.output}" for slot in step.cache.slots]
    command = [python, str(worker), str(folder / MODEL), str(physical_cores()), str(BLOCK), *pairs]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def tell(order: str) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{order}\n")
        process.stdin.flush()
        answer()

    def answer() -> None:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "done":
            raise ChildProcessError(process.communicate()[1][-2000:])

    def doing(order: str) -> Call:
        told = [""]

        def call() -> None:
            if not told[0]:
                tell(order)
                told[0] = order
            tell("run")

        return call

    try:
        answer()
    except ChildProcessError as error:
        return f"{name}: {str(error).strip().splitlines()[-1][:80]}"
    decode = lambda past: doing(f"decode {past} {STEPS}")  # noqa: E731
    return Candidate(name, None, decode, lambda tokens: doing(f"prefill {tokens}"))
