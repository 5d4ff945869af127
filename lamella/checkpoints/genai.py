"""The layout of onnxruntime-genai: an ONNX decoder over shared caches, and what runs it.

The runner knows the names of inputs and outputs alone. It allocates one buffer for past and
present of a slot, and tells the length of a sequence by its mask.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lamella.backends.onnxruntime.binding import binding_of
from lamella.backends.onnxruntime.emission import Caches
from lamella.backends.onnxruntime.files import MODEL, save_model, weight_bytes
from lamella.backends.onnxruntime.writer import unsupported, write_onnx
from lamella.checkpoints.prepared import Prepared, companions, write_companions
from lamella.errors import CheckpointError, IncrementalError
from lamella.ir.cache import CacheLayout
from lamella.ir.graph import Graph
from lamella.rewrite.incremental import incremental
from lamella.rewrite.incremental.check import check_steps

CONFIG = "genai_config.json"
_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3")
"""Decoders the runner has a name for; it drives all of them the same way."""


def genai(graph: Graph, tokenizer: Any | None, max_shard_bytes: int) -> Prepared:
    """Prepare the folder that `onnxruntime_genai.Model` loads.

    Args:
        graph: Of a decoder of transformers, without a cache.
        tokenizer: Is written instead of that of the folder the model came from.
        max_shard_bytes: Not used: the weights are in one file beside the model.

    Raises:
        CheckpointError: The runner can't drive such a model; the message says why.
    """
    step = _step(graph)
    layout = step.cache
    assert layout is not None
    model = write_onnx(step, caches=Caches.SHARED)
    config = _config(graph, layout, [value.name or "" for value in model.graph.inputs])
    files = companions(graph, tokenizer)

    def write(folder: Path) -> None:
        save_model(model, folder)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_companions(folder, files, tokenizer)

    types = {"onnx initializer": len(model.graph.initializers)}
    return Prepared(write, weight_bytes(model), types, _remarks(graph))


def _step(graph: Graph) -> Graph:
    if graph.origin.config is None or graph.origin.generation is None:
        raise CheckpointError("format 'onnxruntime-genai' is for language models of transformers")
    try:
        parts = incremental(graph)
        check_steps(graph, parts.step, parts.once)
    except IncrementalError as error:
        raise CheckpointError(f"format 'onnxruntime-genai' needs a cache: {error}") from error
    layout = parts.step.cache
    assert layout is not None
    other = sorted({slot.kind for slot in layout.slots if not slot.grows})
    if parts.once is not None or other or not layout.slots:
        what = "an encoder" if parts.once is not None else f"a cache of {', '.join(other) or 'no'}"
        raise CheckpointError(
            f"format 'onnxruntime-genai' takes decoders with keys and values, this model has "
            f"{what} {'state' if parts.once is None else ''}".rstrip()
        )
    gaps = unsupported(parts.step)
    if gaps:
        listed = ", ".join(f"{name} (x{count})" for name, count in gaps.items())
        raise CheckpointError(f"no ONNX emitter for {listed}")
    if binding_of(parts.step) is None:
        raise CheckpointError(
            "format 'onnxruntime-genai' needs attention that runs over shared buffers, and that "
            "of this model does not; lower it for onnxruntime instead"
        )
    return parts.step


def _config(graph: Graph, layout: CacheLayout, inputs: list[str]) -> dict[str, Any]:
    config: Any = graph.origin.config
    generation: Any = graph.origin.generation
    length = int(config.get("max_position_embeddings") or config.get("n_positions") or 2048)
    kind, end = str(config.get("model_type")), _end_tokens(graph)
    pad = generation.get("pad_token_id")
    return {
        "model": {
            "bos_token_id": generation.get("bos_token_id") or 0,
            "context_length": length,
            "decoder": _decoder(config, layout, inputs),
            "eos_token_id": end or 0,
            "pad_token_id": pad if pad is not None else (end or [0])[0],
            "type": kind if kind in _TYPES else "llama",
            "vocab_size": config["vocab_size"],
        },
        "search": _search(generation, length),
    }


def _decoder(config: Any, layout: CacheLayout, inputs: list[str]) -> dict[str, Any]:
    """What the runner binds, and the sizes of the caches it allocates."""
    keys = [slot for slot in layout.slots if slot.kind == "key"]
    heads, _, width = keys[0].shape
    named = ("input_ids", "attention_mask", "position_ids")
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": width,
        "hidden_size": config.get("hidden_size", config.get("n_embd")),
        "inputs": {
            **{name: name for name in named if name in inputs},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": layout.logits,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.get("num_attention_heads", config.get("n_head")),
        "num_hidden_layers": len(keys),
        "num_key_value_heads": heads,
    }


def _search(generation: Any, length: int) -> dict[str, Any]:
    return {
        "do_sample": bool(generation.get("do_sample", False)),
        "max_length": length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": float(generation.get("repetition_penalty") or 1.0),
        "temperature": float(generation.get("temperature") or 1.0),
        "top_k": int(generation.get("top_k") or 50),
        "top_p": float(generation.get("top_p") or 1.0),
    }


def _end_tokens(graph: Graph) -> list[int]:
    """The tokens that end a text."""
    for source in (graph.origin.generation or {}, graph.origin.config or {}):
        found: Any = source.get("eos_token_id")
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []


def _remarks(graph: Graph) -> tuple[str, ...]:
    kind = str((graph.origin.config or {}).get("model_type"))
    told: list[str] = []
    if kind not in _TYPES:
        told.append(f"onnxruntime-genai has no name for {kind}; the folder says llama, run alike")
    if not _end_tokens(graph):
        told.append(
            "the model has no end token and onnxruntime-genai needs one: token 0 ends texts"
        )
    return tuple(told)
