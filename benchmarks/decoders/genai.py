"""Folders that onnxruntime-genai runs: what its own model builder makes, and our layout."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoders.candidate import STEPS, Call, Candidate, Sizes, prompt, token
from lamella.backends.onnxruntime.session import Session
from lamella.backends.onnxruntime.threads import physical_cores, worker_cpus

BUILDS = (
    *(("int4", 32, False), ("int4", 32, True), ("int4", 128, False), ("int4", 256, False)),
    ("fp32", 32, False),
)
"""Precision, block (the builder's own default is 32), and whether the cache holds 8-bit codes."""


def is_there() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("onnxruntime_genai") is not None


def built(source: Path, place: Path, sizes: Sizes) -> Iterator[Candidate | str]:
    """Sessions of what the builder makes, its caches bound as ours; a name for each failure."""
    for precision, block, codes in BUILDS:
        name = f"genai builder, {precision}" + (f", blocks of {block}" * (precision == "int4"))
        name += ", 8-bit cache" * codes
        target = place / f"{precision}-{block}-{codes}"
        cache = _scales(place / "scales.json", sizes) if codes else ()
        if not build(source, target, precision, (f"block_size={block}", *cache)):
            yield name
            continue
        files = [file for file in target.iterdir() if file.name.startswith("model.onnx")]
        read = sum(file.stat().st_size for file in files) - sizes.embedding_bytes
        yield bound(name, target, sizes, codes=codes, last_only=False, weight_bytes=read)
        if precision == "int4":
            yield run(f"{name}, in its runner", target)


def run(name: str, folder: Path) -> Candidate:
    """A folder in the runner of onnxruntime-genai, greedy search included."""
    import onnxruntime_genai as genai

    config: Any = genai.Config(str(folder))
    # Threads that wait busily after a call would slow whoever is timed next, and workers on the
    # core of the caller whom they work for.
    threads = physical_cores()
    places = ";".join(str(cpu + 1) for cpu in worker_cpus(threads))
    options: dict[str, Any] = {
        "intra_op_num_threads": threads,
        "session.force_spinning_stop": "1",
        "session.intra_op_thread_affinities": places,
    }
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model: Any = genai.Model(config)

    def generator(room: int) -> Any:
        options: Any = genai.GeneratorParams(model)
        options.set_search_options(max_length=room, min_length=room, do_sample=False)
        return genai.Generator(model, options)

    def decode(past: int) -> Call:
        made = generator(past + 2 * STEPS + 2)
        made.append_tokens(prompt(past).numpy().astype("int32"))
        made.generate_next_token()

        def call() -> None:
            for _ in range(STEPS):
                made.generate_next_token()
            made.rewind_to(past + 1)
            made.append_tokens(token().numpy().astype("int32"))

        return call

    def prefill(tokens: int) -> Call:
        made, ids = generator(tokens + 2), prompt(tokens).numpy().astype("int32")

        def call() -> None:
            made.rewind_to(0)
            made.append_tokens(ids)

        return call

    return Candidate(name, None, decode, prefill)


def _scales(path: Path, sizes: Sizes) -> tuple[str, str]:
    """Options for a cache of codes; time does not hang on what the scales are."""
    layer = [0.03] * (sizes.heads * sizes.width)
    scales = {name: [layer] * sizes.layers for name in ("k_scales", "v_scales")}
    path.write_text(json.dumps({"scales": scales}))
    return "kv_cache_quant_scheme=int8_per_channel", f"kv_cache_scale_file={path}"


def build(source: Path, target: Path, precision: str, given: tuple[str, ...]) -> bool:
    """Have the builder make a folder; tells whether it did."""
    folders = ["-i", str(source), "-o", str(target), "-c", str(target)]
    options = ["-p", precision, "-e", "cpu", "--extra_options", "accuracy_level=4", *given]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *folders, *options]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def bound(
    name: str, folder: Path, sizes: Sizes, *, codes: bool, last_only: bool, weight_bytes: int | None
) -> Candidate:
    """The session of a folder with its caches bound, which hold codes or floats.

    `last_only` says that it gives the logits of the end of a prompt alone.
    """
    session = Session(folder / "model.onnx")

    def ready(past: int, new: int) -> Call:
        call = session.bind()
        for key in [key for key in session.inputs if key.startswith("past_key_values")]:
            floats = sizes.cache(sizes.capacity)
            buffer = (floats * 127).to(torch.int8) if codes else floats
            call.input(key, buffer)
            call.output(key.replace("past_key_values", "present"), buffer)
        call.input("input_ids", prompt(new))
        call.input("attention_mask", prompt(past + new))
        call.output("logits", torch.empty(1, 1 if last_only else new, sizes.vocabulary))
        return call.run

    def decode(past: int) -> Call:
        once = ready(past, 1)
        return lambda: [once() for _ in range(STEPS)]

    return Candidate(name, weight_bytes, decode, lambda tokens: ready(0, tokens))
