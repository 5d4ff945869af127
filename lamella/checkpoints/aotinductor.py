"""A package of AOTInductor with its weights inside: machine code that PyTorch alone runs.

The folder holds ``model.pt2`` and ``model.json``. A process that imports nothing but torch loads
the package with its ``aoti_load_package`` and calls it with the tensors that the description
lists, in its order; it gets tensors in the order of the outputs. A language model is
packaged with its cache: the description says which output of a call is which input of the next.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lamella.backends.torch.aot import AotBackend, called_operators, compile_whole, machine
from lamella.backends.torch.portable import Portable
from lamella.checkpoints.prepared import Prepared, companions, write_companions
from lamella.errors import CheckpointError, IncrementalError
from lamella.ir.graph import Graph
from lamella.rewrite.incremental import incremental
from lamella.rewrite.incremental.check import check_steps

PACKAGE = "model.pt2"
DESCRIPTION = "model.json"


def aotinductor(graph: Graph, tokenizer: Any | None, max_shard_bytes: int) -> Prepared:
    """Compile the package.

    Args:
        graph: Of any model; of a language model without its cache.
        tokenizer: Is written instead of that of the folder the model came from.
        max_shard_bytes: Not used: the weights are in the package.

    Raises:
        CheckpointError: PyTorch alone has no code for some operators, or the model is an
            encoder and a decoder.
        BackendError: There is no C++ compiler, or it fails.
        UnsupportedError: Some operators are not canonical.
    """
    backend = AotBackend()
    backend.ensure_available()
    chosen = _with_cache(graph)
    backend.check(chosen)
    called = called_operators(chosen)
    if called:
        listed = ", ".join(f"{name} (x{count})" for name, count in called.items())
        raise CheckpointError(
            f"format 'aotinductor' runs with PyTorch alone, which has no code for {listed}; "
            f"lower the model for a backend and save the executable instead"
        )
    portable, files = Portable.of(chosen), companions(graph, tokenizer)

    def write(folder: Path) -> None:
        compile_whole(portable, folder / PACKAGE)
        told = json.dumps(_description(chosen, portable), indent=2)
        (folder / DESCRIPTION).write_text(told + "\n", encoding="utf-8")
        write_companions(folder, files, tokenizer)

    types = {"tensor": len(portable.weights)}
    return Prepared(write, 2 * portable.weight_bytes, types, _remarks(chosen))


def _with_cache(graph: Graph) -> Graph:
    if graph.origin.generation is None or graph.origin.config is None:
        return graph
    try:
        parts = incremental(graph)
        check_steps(graph, parts.step, parts.once)
    except IncrementalError as error:
        raise CheckpointError(f"format 'aotinductor' needs a cache: {error}") from error
    if parts.once is not None:
        raise CheckpointError("format 'aotinductor' takes one graph, this model has an encoder too")
    return parts.step


def _description(graph: Graph, portable: Portable) -> dict[str, Any]:
    told: dict[str, Any] = {
        "machine": machine(),
        "inputs": [spec.to_json() for spec in portable.inputs],
        "outputs": list(graph.signature.outputs),
    }
    if graph.cache is not None:
        told["cache"] = graph.cache.to_json()
    return told


def _remarks(graph: Graph) -> tuple[str, ...]:
    few = sum("nbits" in str(n.target) or "int8" in str(n.target) for n in graph.nodes)
    told = [f"compiled for {machine()}; it runs on such a machine only"]
    if few:
        told.append(f"{few} layers of few bits are stored and run as floating point numbers")
    return tuple(told)
