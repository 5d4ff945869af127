"""Models whose `generate` is their own: Whisper cuts audio into segments and adds task tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import transformers
from torch import nn
from transformers import GenerationMixin

from lamella.generation.model import GenerativeExecutable


def class_for(architecture: str) -> type[GenerativeExecutable]:
    """The executable with the `generate` of an architecture of transformers.

    Most have that of `GenerationMixin`; where an architecture mixes in another one, it is mixed
    into the executable as well.
    """
    found = getattr(transformers, architecture, None)
    own = _own_mixins(found) if isinstance(found, type) else ()
    if not own:
        return GenerativeExecutable
    known = _LOOKED_AT.get(own[0].__name__, {})
    return type(GenerativeExecutable.__name__, (GenerativeExecutable, *own), dict(known))


def _own_mixins(architecture: type) -> tuple[type, ...]:
    return tuple(
        one
        for one in architecture.__mro__
        if issubclass(one, GenerationMixin)
        and not issubclass(one, nn.Module)
        and one is not GenerationMixin
    )


def _strides(*strides: int) -> SimpleNamespace:
    convolutions = {f"conv{i}": SimpleNamespace(stride=(s,)) for i, s in enumerate(strides, 1)}
    return SimpleNamespace(encoder=SimpleNamespace(**convolutions))


_LOOKED_AT: dict[str, dict[str, Any]] = {"WhisperGenerationMixin": {"model": _strides(1, 2)}}
"""What the code of a mixin reads from the modules of its model: the same in every checkpoint."""
