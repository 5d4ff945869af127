"""One step of a decoder with its caches bound: a Llama of 88 million parameters, one new token.

    python -m benchmarks.decode [--rounds 40] [--genai PYTHON] [--no-exporter]

Ours at 32, 8 and 4 bits beside the model builder of onnxruntime-genai and the ONNX exporter of
transformers with its fusions for ONNX Runtime. All run in one process, in turns, in the same
ONNX Runtime with the same threads. `--genai` names an interpreter that has onnxruntime-genai (it
brings a runtime of its own); a peer that is missing is a row that says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.record import Result
from lamella.backends.decoder import State
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.session import Session
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.passes.base import Analyses
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from lamella.rewrite.canonicalize import canonicalize
from lamella.rewrite.incremental import incremental
from lamella.timing import measure

PASTS = (128, 1024)
CAPACITY = 2048
VOCABULARY = 8192
FORMATS = ((32, 0), (8, 128), (4, 32), (4, 128))
"""Bits and block of ours."""
STEPS_OF_A_CALL = 5
"""So that threads that wake up, and pauses between candidates, weigh little."""


@dataclass(frozen=True)
class Candidate:
    """What is timed.

    Attributes:
        name: For people.
        weight_bytes: Bytes of the weights that a step reads, as they are stored (scales of 16 bits
            are read as 32); embeddings are read row by row.
        step_at: Past -> a call that decodes one token with that many tokens in the cache.
    """

    name: str
    weight_bytes: int
    step_at: Callable[[int], Callable[[], object]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--genai", help="interpreter that has onnxruntime-genai")
    parser.add_argument("--no-exporter", action="store_true", help="it takes a minute")
    given = parser.parse_args(arguments)
    model = llama()
    with tempfile.TemporaryDirectory() as place:
        found = [*ours(model)]
        absent: list[str] = []
        for peer in _peers(model, Path(place), given):
            (absent if isinstance(peer, str) else found).append(peer)  # pyright: ignore[reportArgumentType]
        rows = _timed(found, given.rounds)
    speed = bandwidth()
    Result(
        name="decode",
        title="One token of a Llama of 88 million parameters, batch 1, caches bound",
        columns=(
            "candidate",
            "MB stored",
            *(f"ms at {past}" for past in PASTS),
            "least ms",
            "ms to read them",
        ),
        rows=[
            *((*row, found[index].weight_bytes / speed * 1e3) for index, row in enumerate(rows)),
            *((name, *["absent"] * (len(PASTS) + 3)) for name in absent),
        ],
        notes=(
            f"Medians over {given.rounds} turns of {STEPS_OF_A_CALL} steps; least: the fastest "
            f"turn at {PASTS[0]}. Ours goes through `Decoder.step`, others are bare sessions",
            f"Bandwidth as measured here: {speed / 1e9:.0f} GB/s reading with two threads",
        ),
    ).publish()


def llama() -> LlamaForCausalLM:
    """12 blocks, 768 wide, 12 heads over 4 for keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=CAPACITY,
    )
    return LlamaForCausalLM(config).eval()


# ---- ours -------------------------------------------------------------------------------


def ours(model: LlamaForCausalLM) -> Iterator[Candidate]:
    """The decoder at every format; weights are rounded to the nearest code."""
    ids = torch.ones(2, 9, dtype=torch.int64)
    graph = capture_module(model, {"input_ids": ids, "attention_mask": ids.clone()})
    canonicalize(graph)
    for bits, block in FORMATS:
        chosen, name = graph, f"lamella, {bits} bits"
        if bits < 32:
            chosen, name = graph.copy(), f"{name}, blocks of {block}"
            QuantizeWeights(bits=bits, block=block).run(chosen, Analyses(chosen))
            chosen.finish()
        yield _ours(name, incremental(chosen).step)


def _ours(name: str, step: Graph) -> Candidate:
    decoder = OnnxRuntimeBackend().decoder(step)
    table = next(n for n in step.nodes if n.op == "get_attr" and "embed_tokens" in str(n.target))
    value = table.meta["val"]
    read = step.weight_bytes() - value.numel() * value.element_size()

    def step_at(past: int) -> Callable[[], object]:
        state = decoder.start(1, CAPACITY)
        decoder.step(state, torch.ones(1, past, dtype=torch.int64), last_only=True)
        token = torch.ones(1, 1, dtype=torch.int64)

        def call() -> None:
            for _ in range(STEPS_OF_A_CALL):
                decoder.step(state, token)
            _back_to(state, past)

        return call

    return Candidate(name, read, step_at)


def _back_to(state: State, past: int) -> None:
    state.crop(past)


# ---- peers ------------------------------------------------------------------------------


def _peers(
    model: LlamaForCausalLM, place: Path, given: argparse.Namespace
) -> Iterator[Candidate | str]:
    folder = place / "huggingface"
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    for precision in ("int4", "fp32"):
        name = f"onnxruntime-genai builder, {precision}"
        built = given.genai and _build(given.genai, precision, folder, place / precision)
        yield _bound(name, place / precision / "model.onnx") if built else name
    name = "transformers exporter, fused, fp32"
    absent = given.no_exporter or importlib.util.find_spec("transformers.exporters") is None
    yield name if absent else _exported(name, model, place / "exported")


def _tokenizer() -> PreTrainedTokenizerFast:
    """The builder wants one; nothing is tokenized."""
    from tokenizers import Tokenizer, models

    words = {f"t{index}": index for index in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "t0")))


def _build(python: str, precision: str, source: Path, target: Path) -> bool:
    words = f"-i {source} -o {target} -p {precision} -e cpu -c {target}"
    command = [python, "-m", "onnxruntime_genai.models.builder", *words.split()]
    extra = ["--extra_options", "int4_accuracy_level=4"]
    return subprocess.run([*command, *extra], check=False, capture_output=True).returncode == 0


def _bound(name: str, path: Path) -> Candidate:
    """A session of a model of the builder, its caches bound as ours are."""
    session = Session(path)
    files = [file for file in path.parent.iterdir() if file.name.startswith(path.name)]
    read = sum(file.stat().st_size for file in files) - VOCABULARY * 768 * 4

    def step_at(past: int) -> Callable[[], object]:
        call = session.bind()
        for key in [key for key in session.inputs if key.startswith("past_key_values")]:
            buffer = torch.zeros(1, 4, CAPACITY, 64)
            call.input(key, buffer)
            call.output(key.replace("past_key_values", "present"), buffer)
        call.input("input_ids", torch.ones(1, 1, dtype=torch.int64))
        call.input("attention_mask", torch.ones(1, past + 1, dtype=torch.int64))
        call.output("logits", torch.empty(1, 1, VOCABULARY))
        return lambda: [call.run() for _ in range(STEPS_OF_A_CALL)]

    return Candidate(name, read, step_at)


def _exported(name: str, model: LlamaForCausalLM, folder: Path) -> Candidate:
    """A session of what transformers exports; its caches grow, and are not taken back here."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    ids = torch.ones(2, 8, dtype=torch.int64)
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
    inputs: dict[str, Any] = {
        "input_ids": ids[:, :3],
        "attention_mask": torch.ones(2, 11, dtype=torch.int64),
        "position_ids": torch.arange(8, 11).expand(2, 3).contiguous(),
        "past_key_values": past,
        "use_cache": True,
    }
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    OnnxExporter().export(model, inputs, config).save_pretrained(folder)
    path = next(folder.rglob("*.onnx"))
    session = Session(path)
    read = sum(p.numel() * 4 for p in model.parameters()) - VOCABULARY * 768 * 4

    def step_at(past: int) -> Callable[[], object]:
        feeds: dict[str, Tensor] = {key: torch.zeros(1, 4, past, 64) for key in session.inputs}
        feeds["input_ids"] = torch.ones(1, 1, dtype=torch.int64)
        feeds["attention_mask"] = torch.ones(1, past + 1, dtype=torch.int64)
        feeds["position_ids"] = torch.full((1, 1), past)
        feeds = {key: feeds[key] for key in session.inputs}
        return lambda: [session.run(feeds, session.outputs) for _ in range(STEPS_OF_A_CALL)]

    return Candidate(name, read, step_at)


# ---- timing -----------------------------------------------------------------------------


def _timed(candidates: Sequence[Candidate], rounds: int) -> list[tuple[object, ...]]:
    """A row for each candidate: megabytes, median milliseconds at every past, the least ones."""
    rows: list[list[object]] = [[c.name, c.weight_bytes / 1e6] for c in candidates]
    least: list[float] = []
    for past in PASTS:
        calls = {c.name: c.step_at(past) for c in candidates}
        times = measure(calls, rounds=rounds)
        for row, candidate in zip(rows, candidates, strict=True):
            row.append(times[candidate.name].median_seconds * 1e3 / STEPS_OF_A_CALL)
        if past == PASTS[0]:
            least = [times[c.name].best_seconds * 1e3 / STEPS_OF_A_CALL for c in candidates]
    return [(*row, fastest) for row, fastest in zip(rows, least, strict=True)]


def bandwidth() -> float:
    """Bytes a second that both cores read from memory: the sum of a large tensor."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    large = torch.ones(2**26)
    timing = measure({"read": large.sum}, rounds=15)["read"]
    torch.set_num_threads(before)
    return large.numel() * 4 / timing.best_seconds


if __name__ == "__main__":
    main()
