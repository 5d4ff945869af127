"""Write an edited graph for another runtime."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from lamella.backends.artifact import MANIFEST, Description, check_target, save_artifact
from lamella.checkpoints.aotinductor import aotinductor
from lamella.checkpoints.compressed_tensors import compressed_tensors
from lamella.checkpoints.genai import genai
from lamella.checkpoints.gguf_file import gguf_file
from lamella.checkpoints.huggingface import huggingface
from lamella.checkpoints.prepared import Prepared
from lamella.checkpoints.report import CheckpointReport
from lamella.errors import CheckpointError, known_names
from lamella.ir.graph import Graph
from lamella.ir.plan import PLAN_FILE
from lamella.ir.stored_plan import stored_plan

Format = Literal["huggingface", "compressed-tensors", "gguf", "onnxruntime-genai", "aotinductor"]

FORMATS: Mapping[str, Callable[[Graph, Any, int], Prepared]] = MappingProxyType(
    {
        "huggingface": huggingface,
        "compressed-tensors": compressed_tensors,
        "gguf": gguf_file,
        "onnxruntime-genai": genai,
        "aotinductor": aotinductor,
    }
)
"""The formats by name."""

KINDS: Mapping[str, str] = MappingProxyType({f"checkpoint-{name}": name for name in FORMATS})
"""What the manifest of a folder calls itself -> its format."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save_checkpoint(
    graph: Graph,
    folder: str | os.PathLike[str],
    *,
    format: Format | str = "huggingface",
    tokenizer: Any | None = None,
    max_shard_size: int | str = "5GB",
) -> CheckpointReport:
    """Write the model that `graph` has become as a checkpoint that other runtimes load.

    The config says which layers are left, weights are named as transformers names them, and
    tokenizer and generation settings come along from the folder that the model was captured
    from. Tensors are made, written and forgotten one by one. The folder is written aside and
    renamed, with a ``manifest.json`` that holds the digest of every file.

    Args:
        graph: Of a model of transformers, from `capture`, after any passes; without a cache.
        folder: New, empty, or an older folder of Lamella, which is replaced.
        format: ``"huggingface"``: config and safetensors, weights of few bits as floating
            point. ``"compressed-tensors"``: the same with the codes of weights of few bits.
            ``"gguf"``: one file for llama.cpp (llama, mistral, qwen2, qwen3).
            ``"onnxruntime-genai"``: an ONNX decoder over shared caches with its
            ``genai_config.json``. ``"aotinductor"``: any model, compiled with its weights into
            a package that PyTorch runs without this library.
        tokenizer: Is written instead of the tokenizer of the folder that was captured.
        max_shard_size: Largest file of weights, as bytes or ``"2GB"``; for safetensors.

    Raises:
        CheckpointError: The format can't say what the graph computes; all reasons are listed,
            and nothing was written.
        ArtifactError: `folder` holds something else.
        OSError: The disk is full, or the place can't be written.
    """
    largest = _bytes_of(max_shard_size)
    check_format(format)
    check_target(Path(folder))
    prepared = FORMATS[format](graph, tokenizer, largest)
    target = Path(folder)
    description = Description(f"checkpoint-{format}", {}, report={"remarks": prepared.remarks})

    plan = stored_plan(graph)

    def write(aside: Path) -> Mapping[str, Any]:
        prepared.write(aside)
        if plan is not None:
            plan.write(aside / PLAN_FILE)
        return {"types": dict(prepared.types)}

    save_artifact(target, description, write, prepared.needed_bytes)
    files = {p.name: p.stat().st_size for p in sorted(target.iterdir()) if p.name != MANIFEST}
    return CheckpointReport(str(target), format, files, prepared.types, prepared.remarks)


def check_format(format: str) -> None:
    """Refuse a format that there isn't, before anything is computed.

    Raises:
        CheckpointError: There is none of that name; the known ones are listed.
    """
    if format not in FORMATS:
        raise CheckpointError(
            f"there is no checkpoint format {format!r}{known_names(format, FORMATS)}"
        )


def _bytes_of(size: int | str) -> int:
    """``"2GB"`` as a number of bytes.

    Raises:
        CheckpointError: It is no size, or less than one byte.
    """
    text = str(size).strip().upper()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)?", text)
    unit = (match[2] or "") if match else ""
    count = int(float(match[1]) * _UNITS.get(unit.removeprefix("B"), 0)) if match else 0
    if count < 1:
        raise CheckpointError(
            f"max_shard_size must be a number of bytes or a size such as '2GB', got {size!r}"
        )
    return count
