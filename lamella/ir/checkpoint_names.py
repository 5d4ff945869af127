"""Which tensors of a checkpoint the weights of a model are, by the rules of transformers.

Checkpoints name weights differently from the model that is built: prefixes come and go, names of
old releases live on, and experts that lie in a file one by one are one weight in memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lamella.errors import ModelFileError
from lamella.ir.model_folder import StoredWeight
from lamella.ir.safetensors_source import Composed, Place, SafetensorsSource

Places = dict[str, Place | Composed]


def source_of(
    folder: Path, model: PreTrainedModel, stored: Mapping[str, StoredWeight]
) -> SafetensorsSource:
    """Where the weights of `model` lie in the files of `folder`.

    Args:
        folder: For messages.
        model: Built without data; its dtypes are those that are read.
        stored: What the files hold.

    Raises:
        ModelFileError: The files lack weights, or hold some in another shape.
    """
    held: dict[str, Any] = model.state_dict(keep_vars=True)
    places = _places(folder, model, held, stored)
    by_value = {id(held[name]): place for name, place in places.items()}
    for name, value in held.items():
        if id(value) in by_value:
            # Of two tied weights a checkpoint holds one.
            places.setdefault(name, by_value[id(value)])
    lost = sorted(n for n in held if n not in places and not _may_be_missing(model, n))
    if lost:
        raise ModelFileError(
            f"{str(folder)!r} lacks weights of {type(model).__name__}: {', '.join(lost)}; give the "
            f"class that the checkpoint was saved from"
        )
    return SafetensorsSource(places)


@dataclass
class _Conversion:
    """Tensors of the files that one conversion of transformers turns into weights."""

    converter: WeightConverter
    keys: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)

    def run(self, target: str, tensors: Sequence[Tensor], model: PreTrainedModel) -> dict[str, Any]:
        """The weights by name, from the tensors in the order of `keys`."""
        converter = copy.deepcopy(self.converter)
        for key, pattern, tensor in zip(self.keys, self.patterns, tensors, strict=True):
            # The rules take tensors as they take the results of their reading threads.
            converter.add_tensor(target, key, pattern, tensor)  # pyright: ignore[reportArgumentType]
        made: dict[str, Any] = converter.convert(target, model=model, config=model.config)
        return {n: value[0] if isinstance(value, list) else value for n, value in made.items()}


def _places(
    folder: Path,
    model: PreTrainedModel,
    held: dict[str, Any],
    stored: Mapping[str, StoredWeight],
) -> Places:
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    places: Places = {}
    conversions: dict[str, _Conversion] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, held)
        if name not in held and key in held:
            name, pattern = key, None
        if pattern is not None:
            conversion = conversions.setdefault(name, _Conversion(by_pattern[pattern]))
            conversion.keys.append(key)
            conversion.patterns.append(pattern)
        elif name in held:
            entry = stored[key].entry
            _check_shape(folder, name, entry.shape, held[name])
            places[name] = Place(stored[key].path, key, held[name].dtype, entry.shape)
    for target, conversion in conversions.items():
        places |= _converted(folder, model, held, target, conversion, stored)
    return places


def _converted(
    folder: Path,
    model: PreTrainedModel,
    held: Mapping[str, Tensor],
    target: str,
    conversion: _Conversion,
    stored: Mapping[str, StoredWeight],
) -> Places:
    """The weights that a conversion makes, found by running it on tensors without data."""
    entries = [stored[key].entry for key in conversion.keys]
    shapes = [torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries]
    parts = tuple(
        Place(stored[key].path, key, entry.dtype, entry.shape)
        for key, entry in zip(conversion.keys, entries, strict=True)
    )
    found: Places = {}
    for name, made in conversion.run(target, shapes, model).items():
        if name in held:
            _check_shape(folder, name, tuple(made.shape), held[name])

            def compose(tensors: list[Tensor], name: str = name) -> Tensor:
                return conversion.run(target, tensors, model)[name].to(held[name].dtype)

            found[name] = Composed(parts, compose)
    return found


def _check_shape(folder: Path, name: str, shape: tuple[int, ...], held: Tensor) -> None:
    if shape != tuple(held.shape):
        raise ModelFileError(
            f"{str(folder)!r} has weight {name!r} of shape {list(shape)}, its config says "
            f"{list(held.shape)}"
        )


def _may_be_missing(model: PreTrainedModel, name: str) -> bool:
    # transformers keeps the list here and has no public name for it.
    patterns: Any = model._keys_to_ignore_on_load_missing or ()  # pyright: ignore[reportPrivateUsage]
    return any(re.search(pattern, name) for pattern in patterns)
