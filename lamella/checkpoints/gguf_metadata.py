"""What a GGUF file says of a model of the Llama type beside its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lamella.errors import CheckpointError

Value = str | bool | int | float | list[str] | list[int] | list[float]


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp calls and lays out a type of model.

    Attributes:
        name: The architecture in the file.
        turns_pairs: Rotary pairs are neighbors there and half a head apart in transformers, so
            that rows of queries and keys change places.
    """

    name: str
    turns_pairs: bool = False


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("llama", turns_pairs=True),
        "mistral": Architecture("llama", turns_pairs=True),
        "qwen2": Architecture("qwen2"),
        "qwen3": Architecture("qwen3"),
    }
)
"""Model types of transformers that can be written."""


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a config.

    Raises:
        CheckpointError: It can't be written, or says something that the format can't.
    """
    found = ARCHITECTURES.get(str(config.model_type))
    if found is None:
        raise CheckpointError(
            f"gguf is written for {', '.join(ARCHITECTURES)}, not for {config.model_type}"
        )
    problems = list(_problems(config, found))
    if problems:
        raise CheckpointError(f"gguf has no way to say that {'; '.join(problems)}")
    return found


def metadata(config: Any, architecture: Architecture) -> dict[str, Value]:
    """The numbers of the model, by the keys of the format."""
    head = head_size(config)
    rope = _rope(config)
    numbers: dict[str, Value] = {
        "vocab_size": int(config.vocab_size),
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(rope.get("rope_theta", 10_000.0)),
    }
    if rope["rope_type"] == "linear":
        numbers |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return {f"{architecture.name}.{key}": value for key, value in numbers.items()}


def remarks(config: Any) -> Iterator[str]:
    """What a reader of the file does otherwise."""
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if window and (sliding or config.model_type == "mistral"):
        yield f"readers attend to all tokens: the same up to the sliding window of {window} tokens"
    if _rope(config)["rope_type"] != "default":
        yield "rotary positions are scaled, which transformers doesn't read from the file"


def frequency_factors(config: Any, model: PreTrainedModel) -> Tensor | None:
    """By what the rotary frequencies are divided, ``[head / 2]``; None for the plain ones."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled = next(value for name, value in model.named_buffers() if name.endswith("inv_freq"))
    head = head_size(config)
    exponents = torch.arange(0, head, 2, dtype=torch.float64) / head
    return (float(rope["rope_theta"]) ** -exponents / scaled.double()).float()


def neighbors(heads: int) -> Any:
    """The order of rows in which rotary pairs are neighbors, for a weight of so many heads."""

    def order(value: Tensor) -> Tensor:
        split = value.unflatten(0, (heads, 2, -1))
        return split.transpose(1, 2).reshape(value.shape)

    return order


def head_size(config: Any) -> int:
    """Channels of a head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rope(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    return {"rope_type": "default", **found}


def _problems(config: Any, architecture: Architecture) -> Iterator[str]:
    """What of a config has no place in the format."""
    if config.hidden_act not in ("silu", "swish"):
        yield f"the activation is {config.hidden_act}"
    rope = _rope(config)
    known = ("default", "linear", *(["llama3"] if architecture.name == "llama" else []))
    if rope["rope_type"] not in known:
        yield f"rotary positions are scaled by {rope['rope_type']} (known: {', '.join(known)})"
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        yield f"{rope['partial_rotary_factor']} of a head is rotated"
