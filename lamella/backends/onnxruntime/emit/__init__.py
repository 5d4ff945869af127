"""One emitter per canonical operator, by subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch.fx import Node

from lamella.backends.onnxruntime.emission import Emission, Emitter
from lamella.backends.onnxruntime.emit import (
    activation,
    adjoint,
    adjoint_attention,
    arithmetic,
    attention,
    cached_attention,
    cached_scan,
    comparison,
    contraction,
    convolution,
    creation,
    head_scan,
    indexing,
    integers,
    merged,
    normalization,
    padding,
    quantized,
    reduction,
    resize,
    rotary,
    scan,
    skip_norm,
    sum_apart,
    view,
    wanted_rows,
)

_MODULES = (
    activation,
    adjoint,
    adjoint_attention,
    arithmetic,
    attention,
    cached_attention,
    cached_scan,
    comparison,
    contraction,
    convolution,
    creation,
    head_scan,
    indexing,
    integers,
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

Emitters = Mapping[Callable[..., Any], Emitter]

FUSIONS: tuple[Callable[[Emission, Emitters], dict[Node, Emitter]], ...] = (
    merged.plan,
    skip_norm.plan,
    sum_apart.plan,
    wanted_rows.plan,
)
"""What finds the nodes that are written otherwise than by the emitter of their operator; the
first that wants a node gets it."""
