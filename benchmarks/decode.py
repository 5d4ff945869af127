"""A decoder with its cache: milliseconds a token and for a prompt, ours beside what others make.

    python -m benchmarks.decode [--model llama|trained] [--openvino PYTHON] [--rounds 15]

The model is a Llama of 88 million random weights, or the trained language model of the zoo.
Everything takes turns in one process with the same threads: ours at several widths, the model
builder of onnxruntime-genai (its sessions bare, and in its own runner), our layout for that runner,
the ONNX exporter of transformers with its fusions for ONNX Runtime, and PyTorch. What a process is
lucky or unlucky with stays so while it lives, up to a tenth of the time; so that there are several,
one after the other. `--openvino` names an interpreter that has openvino and nncf. A peer that is
missing is a row that says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import lamella
from benchmarks.decoders import genai, ours, torch_peers
from benchmarks.decoders.candidate import STEPS, Call, Candidate, Sizes, llama
from benchmarks.decoders.openvino_peer import openvino
from benchmarks.record import Result
from benchmarks.zoo.language_model import language_model
from lamella.backends.onnxruntime.threads import physical_cores
from lamella.ir.graph import Graph
from lamella.timing import measure

PROMPTS = (128, 512)
SOURCES = {"llama": "A Llama of 88 million parameters", "trained": "The trained language model"}


@dataclass(frozen=True)
class Times:
    """What one process measured.

    Attributes:
        columns: Heading -> candidate -> milliseconds.
        read_bytes: Candidate -> bytes of the weights that a step reads, where that is known.
        absent: Candidates that are not there.
    """

    columns: dict[str, dict[str, float]]
    read_bytes: dict[str, int | None]
    absent: list[str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(SOURCES), default="llama")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15, help="turns; a third for prompts")
    parser.add_argument("--openvino", metavar="PYTHON", help="interpreter with openvino and nncf")
    parser.add_argument("--no-exporter", action="store_true", help="it takes a minute")
    parser.add_argument("--record", action="store_true", help="write the table of results")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.into is not None:
        given.into.write_text(json.dumps(asdict(_measured(given))))
        return
    torch.set_num_threads(physical_cores())
    found = [_in_a_process(given) for _ in range(given.processes)]
    result = _result(given.model, found)
    result.publish() if given.record else result.show()


def _in_a_process(given: argparse.Namespace) -> Times:
    with tempfile.TemporaryDirectory() as place:
        into = Path(place) / "times.json"
        command = [sys.executable, "-m", "benchmarks.decode", "--into", str(into)]
        command += ["--model", given.model, "--rounds", str(given.rounds)]
        command += ["--openvino", given.openvino] if given.openvino else []
        command += ["--no-exporter"] if given.no_exporter else []
        subprocess.run(command, check=True)
        return Times(**json.loads(into.read_text()))


def _measured(given: argparse.Namespace) -> Times:
    """What this process measures."""
    torch.set_num_threads(physical_cores())
    with tempfile.TemporaryDirectory() as place:
        model, folder = source_of(given.model, Path(place))
        sizes = Sizes.of(model)
        found: list[Candidate] = []
        absent: list[str] = []
        for each in _candidates(model, folder, Path(place), given):
            (absent if isinstance(each, str) else found).append(each)  # pyright: ignore[reportArgumentType]
        pasts = (128, min(1024, sizes.capacity - 64))
        columns = _columns(found, pasts, given.rounds)
    return Times(columns, {one.name: one.weight_bytes for one in found}, absent)


def source_of(name: str, place: Path) -> tuple[LlamaForCausalLM, Path]:
    """One of `SOURCES`, and the folder it is in; `place` is for one that has none."""
    if name == "trained":
        folder = language_model()
        return AutoModelForCausalLM.from_pretrained(folder).eval(), folder
    model, folder = llama(), place / "llama"
    model.save_pretrained(folder)
    _tokenizer(model.config.vocab_size).save_pretrained(folder)
    return model, folder


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """The builder wants one; nothing is tokenized."""
    from tokenizers import Tokenizer, models

    words = {f"t{index}": index for index in range(vocabulary)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "t0")))


def _candidates(
    model: LlamaForCausalLM, folder: Path, place: Path, given: argparse.Namespace
) -> Iterator[Candidate | str]:
    sizes, graph = Sizes.of(model), lamella.capture(folder)
    yield from ours.ours(graph, sizes.capacity)
    if genai.is_there():
        yield from genai.built(folder, place, sizes)
        yield from _in_the_layout(graph, place, sizes)
    else:
        yield "onnxruntime-genai"
    name = "transformers exporter, fused"
    absent = given.no_exporter or importlib.util.find_spec("transformers.exporters") is None
    yield name if absent else torch_peers.exported(model, place / "exported", sizes)
    yield torch_peers.eager(model, sizes)
    if given.openvino:
        yield openvino(given.openvino, graph, place / "standard")
    else:
        yield "OpenVINO, int4"


def _in_the_layout(graph: Graph, place: Path, sizes: Sizes) -> Iterator[Candidate]:
    """Our folders as the builder's: their sessions bare, and in the runner."""
    coded = ours.with_codes(graph)
    for block, cache in ((32, ""), (128, ""), (256, ""), (256, ", 8-bit cache")):
        target = place / f"ours-{block}{cache}"
        made = ours.quantized(coded if cache else graph, 4, block)
        lamella.save_checkpoint(made, target, format="onnxruntime-genai")
        name = f"lamella, 4 bits, blocks of {block}{cache}"
        yield genai.bound(
            f"{name}, bare", target, sizes, codes=bool(cache), last_only=True, weight_bytes=None
        )
        yield genai.run(f"{name}, in that runner", target)


# ---- timing -----------------------------------------------------------------------------


def _columns(
    found: Sequence[Candidate], pasts: Sequence[int], rounds: int
) -> dict[str, dict[str, float]]:
    """Heading -> candidate -> milliseconds."""
    steps = {
        f"ms at {past}": _timed([(c.name, c.decode, past) for c in found], rounds, STEPS)
        for past in pasts
    }
    few = max(rounds // 3, 3)
    prompts = {
        f"prompt of {size}": _timed([(c.name, c.prefill, size) for c in found], few, 1)
        for size in PROMPTS
    }
    return steps | prompts


def _result(model: str, found: Sequence[Times]) -> Result:
    """A row for each candidate."""
    speed, first = bandwidth(), found[0]
    rows: list[tuple[object, ...]] = []
    for name, read in first.read_bytes.items():
        sizes = ("", "") if read is None else (read / 1e6, read / speed * 1e3)
        times = (
            statistics.median(one.columns[heading][name] for one in found if name in one.read_bytes)
            for heading in first.columns
        )
        rows.append((name, *sizes, *times))
    rows += [(name, *["absent"] * (len(first.columns) + 2)) for name in first.absent]
    return Result(
        name="decode" if model == "llama" else "decode_trained",
        title=f"{SOURCES[model]}, batch 1: milliseconds a token and for a prompt",
        columns=("candidate", "MB", "ms to read", *first.columns),
        rows=rows,
        notes=(
            f"Medians over {len(found)} processes, each of them of interleaved turns, {STEPS} "
            "steps each. Ours goes through `Decoder.step` with caches bound; bare, and the "
            "builder's models, are sessions with theirs bound and nothing between two calls; "
            "runners include the search for the next token",
            "For a prompt, ours and PyTorch give the logits of its end alone; the models of others "
            "give all of them, 8 to 10 % of the products",
            "MB: of the weights a step reads; ms to read them at the "
            f"{speed / 1e9:.0f} GB/s that a sum over a large tensor reaches here",
        ),
    )


def _timed(
    calls: Sequence[tuple[str, Callable[[int], Call], int]], rounds: int, steps: int
) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    times = measure({name: make(size) for name, make, size in calls}, rounds=rounds)
    return {name: timing.median_seconds * 1e3 / steps for name, timing in times.items()}


def bandwidth() -> float:
    """Bytes a second that all cores read from memory: the sum of a large tensor."""
    large = torch.ones(2**26)
    return large.numel() * 4 / measure({"read": large.sum}, rounds=15)["read"].best_seconds


if __name__ == "__main__":
    main()
