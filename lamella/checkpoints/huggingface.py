"""An ordinary folder of Hugging Face: config, safetensors, tokenizer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from lamella.checkpoints.names import stored
from lamella.checkpoints.prepared import Prepared, companions, write_companions
from lamella.checkpoints.reference import reference_of
from lamella.checkpoints.safetensors_writer import write_shards
from lamella.checkpoints.weights import weights_for
from lamella.ir.graph import Graph


def huggingface(graph: Graph, tokenizer: Any | None, max_shard_bytes: int) -> Prepared:
    """The folder of an edited graph; weights of few bits become floating point again.

    Raises:
        CheckpointError: No config and weights say what `graph` computes.
    """
    reference = reference_of(graph)
    found = weights_for(graph, reference)
    tensors = list(stored(reference.model, found.weights))
    packed = [weight.name for weight in found.weights if weight.packed is not None]
    remarks = list(found.remarks)
    if packed:
        remarks.append(
            f"{len(packed)} weights of few bits are written as "
            f"{str(reference.config.dtype).removeprefix('torch.')}; format='compressed-tensors' "
            f"keeps their codes"
        )
    files = companions(graph, tokenizer)

    def write(folder: Path) -> None:
        write_config(folder, reference.config)
        write_shards(folder, tensors, max_shard_bytes)
        write_companions(folder, files, tokenizer)

    needed = sum(one.nbytes for one in tensors) + sum(path.stat().st_size for path in files)
    types = Counter(str(weight.dtype).removeprefix("torch.") for weight in found.weights)
    return Prepared(write, needed, dict(types), tuple(remarks))


def write_config(folder: Path, config: PreTrainedConfig) -> None:
    """Write ``config.json``."""
    config.save_pretrained(folder)
