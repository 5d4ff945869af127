"""One emitter per canonical operator, by subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lamella.backends.onnxruntime.emission import Emitter
from lamella.backends.onnxruntime.emit import (
    activation,
    arithmetic,
    attention,
    comparison,
    contraction,
    convolution,
    creation,
    indexing,
    normalization,
    padding,
    quantized,
    reduction,
    resize,
    rotary,
    scan,
    view,
)

_MODULES = (
    activation,
    arithmetic,
    attention,
    comparison,
    contraction,
    convolution,
    creation,
    indexing,
    normalization,
    padding,
    quantized,
    reduction,
    resize,
    rotary,
    scan,
    view,
)

EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {target: emitter for module in _MODULES for target, emitter in module.EMITTERS.items()}
)
"""Canonical operator -> what writes it as ONNX."""
