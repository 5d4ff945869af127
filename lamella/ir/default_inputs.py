"""Sample inputs of a Hugging Face model, made from its config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lamella.errors import CaptureError

BATCH = 2
SEQUENCE = 8
_AUDIO = 4000


def default_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs that `model` can be traced with: a batch of 2, 8 tokens, images of the config's size.

    Numbers are seeded; nothing but shapes and types matters for a trace.

    Raises:
        CaptureError: The model takes something that the config says too little about.
    """
    taken = inspect.signature(model.forward).parameters
    main = model.main_input_name
    generator = torch.Generator().manual_seed(0)
    builders = {
        "input_ids": _tokens,
        "pixel_values": _pixels,
        "input_values": _waves,
        "input_features": _features,
        "flattened_patches": _patches,
    }
    if main not in builders:
        raise CaptureError(
            f"{type(model).__name__} takes {main!r}, for which there are no default inputs; give "
            f"sample inputs"
        )
    inputs = builders[main](model.config, generator)
    if main == "input_ids" and "pixel_values" in taken and _is_two_towers(model.config):
        inputs |= _pixels(model.config.vision_config, generator)
    if "decoder_input_ids" in taken and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _ids(model.config, generator, SEQUENCE - 2)
    return {name: value for name, value in inputs.items() if name in taken}


def _is_two_towers(config: PreTrainedConfig) -> bool:
    """Whether text and images meet only in a projection, as in CLIP."""
    return hasattr(config, "vision_config") and hasattr(config, "projection_dim")


def _tokens(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    ids = _ids(config, generator, SEQUENCE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _ids(config: PreTrainedConfig, generator: torch.Generator, length: int) -> Tensor:
    size = int(_of(config, ("vocab_size",), 100))
    longest = int(_of(config, ("max_position_embeddings", "n_positions"), length) or length)
    # Ids at the bottom are special in most vocabularies.
    low = min(3, size - 1)
    return torch.randint(low, size, (BATCH, min(length, longest)), generator=generator)


def _pixels(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    size: Any = _of(config, ("image_size",), 224)
    height, width = (size, size) if isinstance(size, int) else _height_width(size)
    channels = int(_of(config, ("num_channels",), 3))
    return {"pixel_values": torch.randn(BATCH, channels, height, width, generator=generator)}


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    return int(size[0]), int(size[1])


def _waves(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, _AUDIO, generator=generator)}


def _features(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    bins = int(_of(config, ("num_mel_bins",), 80))
    frames = 2 * int(_of(config, ("max_source_positions",), 1500))
    return {"input_features": torch.randn(BATCH, bins, frames, generator=generator)}


def _patches(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Patches of an image with their row and column in front, as `Pix2Struct` takes them."""
    width = int(_of(config.vision_config, ("patch_embed_hidden_size",), 768))
    count = 4 * SEQUENCE
    values = torch.randn(BATCH, count, width, generator=generator)
    rows = torch.arange(count).div(SEQUENCE, rounding_mode="floor") + 1.0
    columns = torch.arange(count) % SEQUENCE + 1.0
    places = torch.stack((rows, columns), dim=-1).expand(BATCH, -1, -1)
    patches = torch.cat((places, values), dim=-1)
    return {"flattened_patches": patches, "attention_mask": torch.ones(BATCH, count)}


def _of(config: PreTrainedConfig, names: tuple[str, ...], default: Any) -> Any:
    """The first of `names` that the config or the config of its text has."""
    for owner in (config, config.get_text_config(), getattr(config, "vision_config", None)):
        for name in names:
            if getattr(owner, name, None) is not None:
                return getattr(owner, name)
    return default
