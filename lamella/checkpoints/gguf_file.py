"""A model of the Llama type as one GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamella.checkpoints import gguf_metadata
from lamella.checkpoints.gguf_metadata import Architecture
from lamella.checkpoints.gguf_package import check_installed, tensor_names, write_file
from lamella.checkpoints.gguf_tokenizer import vocabulary
from lamella.checkpoints.gguf_types import Encoded, Kind, encoded
from lamella.checkpoints.prepared import Prepared, companions, write_companions
from lamella.checkpoints.reference import Reference, captured_config, reference_of
from lamella.checkpoints.report import listed
from lamella.checkpoints.weights import Weight, weights_for
from lamella.errors import CheckpointError
from lamella.ir.graph import Graph
from lamella.ir.huggingface import load_tokenizer

MODEL = "model.gguf"
"""Name of the file."""

_FILE_TYPES: Mapping[Kind, int] = {
    Kind.F32: 0,
    Kind.F16: 1,
    Kind.Q4_0: 2,
    Kind.Q4_1: 3,
    Kind.Q8_0: 7,
    Kind.Q5_0: 8,
    Kind.Q5_1: 9,
    Kind.Q2_K: 10,
    Kind.Q3_K: 12,
    Kind.Q6_K: 18,
    Kind.BF16: 32,
}
_QUANTIZATION_VERSION = 2


def gguf_file(graph: Graph, tokenizer: Any | None, max_shard_bytes: int) -> Prepared:
    """``model.gguf`` of an edited graph; `max_shard_bytes` has no meaning for one file.

    Raises:
        CheckpointError: The package `gguf` is missing, the architecture can't be written, or no
            config and weights say what `graph` computes.
    """
    check_installed()
    architecture = gguf_metadata.architecture_of(captured_config(graph))
    reference = reference_of(graph)
    found = weights_for(graph, reference)
    tensors = list(_tensors(reference, architecture, found.weights))
    files = companions(graph, tokenizer)
    words = vocabulary(_tokenizer(graph, tokenizer), int(reference.config.vocab_size))
    entries = {
        "general.name": graph.origin.architecture,
        "general.file_type": _FILE_TYPES[_main_kind(tensors)],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **gguf_metadata.metadata(reference.config, architecture),
        **words.entries,
    }

    def write(folder: Path) -> None:
        write_file(folder / MODEL, architecture.name, entries, tensors)
        write_companions(folder, files, tokenizer)

    needed = sum(one.nbytes for one in tensors) + sum(path.stat().st_size for path in files)
    remarks = (
        *found.remarks,
        *_notes(tensors),
        *gguf_metadata.remarks(reference.config),
        *words.remarks,
    )
    types = Counter(one.kind.name for one in tensors)
    return Prepared(write, needed, dict(types), remarks)


def _tensors(
    reference: Reference, architecture: Architecture, weights: Iterable[Weight]
) -> Iterator[Encoded]:
    config: Any = reference.config
    names = tensor_names(architecture.name, int(config.num_hidden_layers))
    heads = {
        "attn_q": int(config.num_attention_heads),
        "attn_k": int(config.num_key_value_heads),
    }
    for weight in weights:
        stem, _, leaf = weight.name.rpartition(".")
        found = names.get(stem)
        if found is None:
            raise CheckpointError(
                f"gguf has no name for weight {weight.name} of {architecture.name}"
            )
        count = heads.get(found.rpartition(".")[2])
        turned = count is not None and architecture.turns_pairs
        rows = gguf_metadata.neighbors(count) if turned and count else None
        yield encoded(f"{found}.{leaf}", weight, rows)
    factors = gguf_metadata.frequency_factors(config, reference.model)
    if factors is not None:
        yield encoded("rope_freqs.weight", _constant("rope_freqs", factors), None)


def _constant(name: str, value: Tensor) -> Weight:
    return Weight(name, tuple(value.shape), torch.float32, lambda: value)


def _main_kind(tensors: Iterable[Encoded]) -> Kind:
    """The type that holds most bytes."""
    sizes = Counter[Kind]()
    for one in tensors:
        sizes[one.kind] += one.nbytes
    return sizes.most_common(1)[0][0]


def _notes(tensors: Iterable[Encoded]) -> Iterator[str]:
    """What was stored otherwise than the graph has it, with the tensors."""
    notes: dict[str, list[str]] = {}
    for one in tensors:
        if one.note:
            notes.setdefault(f"{one.note} ({one.kind.name})", []).append(one.name)
    for note, names in notes.items():
        yield f"{note}: {listed(names)}"


def _tokenizer(graph: Graph, tokenizer: Any | None) -> Any | None:
    if tokenizer is not None or graph.origin.folder is None:
        return tokenizer
    return load_tokenizer(Path(graph.origin.folder))
