"""Formats: bytes of files as predicted and as written, and times of kernels.

``python -m benchmarks.formats bytes [--plans 30]``
``python -m benchmarks.formats kernels [--size 2048]``
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import Result
from lamella.backends.formats import QuantFormat
from lamella.backends.onnxruntime.backend import OnnxRuntimeBackend
from lamella.backends.onnxruntime.files import save_model
from lamella.backends.onnxruntime.writer import write_onnx
from lamella.backends.torch.portable import Portable
from lamella.checkpoints.bytes import FORMULAS, ByteFormula, Shape
from lamella.checkpoints.save import save_checkpoint
from lamella.ir.graph import Graph
from lamella.ir.huggingface import capture_pretrained
from lamella.ir.ops import aten
from lamella.ir.quantize import BITS, Format, blocks_of
from lamella.passes.base import Analyses
from lamella.passes.sites import Site, find_sites
from lamella.passes.transforms.quantize_weights import QuantizeWeights
from lamella.rewrite.canonicalize import canonicalize
from lamella.tuning.layers import layer, sample

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
ROWS = (1, 16, 128)
STANDARD = "onnxruntime, standard operators"
WHOLE = ("onnxruntime", STANDARD, "eager")
"""Targets whose files hold the graph too."""

ROUNDS = 9


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("bytes", "kernels"))
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--size", type=int, default=2048)
    given = parser.parse_args()
    result = bytes_of_plans(given.plans) if given.part == "bytes" else kernels(given.size)
    result.publish()


# ---- bytes ----------------------------------------------------------------------------------


def bytes_of_plans(count: int) -> Result:
    """Random plans on a random Llama: what is predicted before rounding, and what files take."""
    targets = [*FORMULAS, STANDARD]
    errors: dict[str, list[float]] = {target: [] for target in targets}
    sizes: dict[str, list[int]] = {target: [] for target in targets}
    graph = small_llama()
    uniform = {site.weight: Format(4, 32) for site in find_sites(graph)}
    plain = rounded(graph, uniform)
    structure = {t: written(plain, t) - weights_of(graph, t, uniform) for t in WHOLE}
    for seed in range(count):
        plan = random_plan(graph, seed)
        edited = rounded(graph, plan)
        for target in targets:
            real = written(edited, target)
            predicted = weights_of(graph, target, plan) + structure.get(target, 0)
            errors[target].append(abs(predicted - real) / real)
            sizes[target].append(real)
    rows = [
        (target, min(sizes[target]), max(sizes[target]), *(100 * one for one in _spread(found)))
        for target, found in errors.items()
    ]
    columns = ("file", "smallest, bytes", "largest, bytes", "median error, %", "largest error, %")
    model = f"random Llama of {sum(site.size for site in find_sites(graph)) / 1e6:.1f} M weights"
    notes = (
        "predicted: byte formulas of the weights; of ONNX files and torch packages also what is "
        "beside the weights when all of them have 4 bits",
        "each plan draws bits, block and zero points for every group of weights",
    )
    return Result("formats_bytes", f"{count} random plans, {model}", columns, rows, notes)


def small_llama(**sizes: Any) -> Graph:
    """A canonical graph with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **sizes})
    graph = capture_pretrained(LlamaForCausalLM(config).eval(), None)
    canonicalize(graph)
    return graph


def random_plan(graph: Graph, seed: int) -> dict[str, Format]:
    """A format for every weight; those of a layer that are merged need not agree."""
    draw = random.Random(seed)

    def drawn() -> Format:
        bits = draw.choice(BITS)
        return Format(bits, draw.choice(blocks_of(bits)), draw.random() < 0.7)

    return {site.weight: drawn() for site in find_sites(graph)}


def rounded(graph: Graph, plan: Mapping[str, Format]) -> Graph:
    """A copy with its weights in the formats of a plan."""
    edited = graph.copy()
    edited.plan = plan
    QuantizeWeights().run(edited, Analyses(edited))
    edited.finish()
    return edited


def standard_bytes(shape: Shape, format: Format, dtype: torch.dtype, is_table: bool) -> int:
    """In an ONNX file without operators of ONNX Runtime, by the formats of the backend."""
    if format.bits == 32:
        return shape[0] * shape[1] * dtype.itemsize
    role = "embedding" if is_table else "linear"
    wanted = (role, format.kernel_bits, format.block, format.symmetric)
    offered = OnnxRuntimeBackend(contrib=False).formats()
    (found,) = (f for f in offered if (f.role, f.bits, f.block, f.symmetric) == wanted)
    return found.weight_bytes(shape)


def weights_of(graph: Graph, target: str, plan: Mapping[str, Format]) -> int:
    """The bytes of all weights, by the formulas."""
    formula: ByteFormula = standard_bytes if target == STANDARD else FORMULAS[target]
    sites = {site.weight: site for site in find_sites(graph)}
    total = 0
    for node in graph.weight_nodes():
        value, site = node.meta["val"], sites.get(str(node.target))
        if site is not None:
            format = plan.get(site.weight, Format(32))
            total += formula(site.shape, format, site.dtype, _is_table(site))
        elif target in WHOLE or _is_of_the_model(graph, str(node.target)):
            total += value.numel() * value.element_size()
    return total


def written(graph: Graph, target: str) -> int:
    """Bytes of the tensors in files, or of the files where the structure is predicted too."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if target in ("onnxruntime", STANDARD):
            save_model(write_onnx(graph, contrib=target != STANDARD), folder)
            return sum(one.stat().st_size for one in folder.iterdir())
        if target == "eager":
            Portable.of(graph).write(folder)
            return sum(one.stat().st_size for one in folder.iterdir())
        if not graph_has_codes(graph, target):
            return weights_of(graph, target, {})
        save_checkpoint(graph, folder / "out", format=target)
        ending = "*.gguf" if target == "gguf" else "*.safetensors"
        return sum(one.stat().st_size for one in (folder / "out").glob(ending))


def graph_has_codes(graph: Graph, target: str) -> bool:
    """Whether there is something for the format to hold."""
    return target == "gguf" or any("packed" in str(node.target) for node in graph.weight_nodes())


def _is_table(site: Site) -> bool:
    return any(reader.target is aten.embedding.default for reader in site.readers)


def _is_of_the_model(graph: Graph, name: str) -> bool:
    """Whether a checkpoint holds it: constants that were computed are no weights of the model."""
    return name.endswith((".weight", ".bias"))


def _spread(values: list[float]) -> tuple[float, float]:
    return statistics.median(values), max(values)


# ---- kernels --------------------------------------------------------------------------------


def kernels(size: int) -> Result:
    """Times of a square layer in every format, the formats in turns."""
    backends = {"contrib": OnnxRuntimeBackend(), "standard": OnnxRuntimeBackend(contrib=False)}
    formats = [
        (kind, format)
        for kind, backend in backends.items()
        for format in backend.formats()
        if format.role == "linear" and format.symmetric
    ]
    shape = (size, size)
    runs = {(kind, format): backends[kind].lower(layer(format, shape)) for kind, format in formats}
    rows: list[tuple[Any, ...]] = []
    times: dict[tuple[str, QuantFormat], list[float]] = {key: [] for key in runs}
    for count in ROWS:
        value = sample("linear", shape, count)
        calls = {key: executable.repeated([value]) for key, executable in runs.items()}
        for key, seconds in _medians(calls).items():
            times[key].append(seconds * 1e6)
    for (kind, format), found in times.items():
        rows.append((kind, format.name, format.kernel, *found))
    columns = ("operators", "format", "kernel", *(f"µs, {count} rows" for count in ROWS))
    title = f"one layer of {size} x {size}, onnxruntime, median of {ROUNDS}"
    return Result("formats_kernels", title, columns, rows, ("formats take turns",))


def _medians(calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for turn in range(ROUNDS + 2):
        for key, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            if turn > 1:
                seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(found) for key, found in seconds.items()}


if __name__ == "__main__":
    main()
