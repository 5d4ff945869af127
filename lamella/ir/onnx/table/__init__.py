"""What each ONNX operator means in ATen: one function per operator, by domain."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lamella.ir.onnx.table import (
    activations,
    attention,
    contraction,
    contrib,
    convolution,
    creation,
    elementwise,
    indexing,
    integers,
    normalization,
    quantized,
    reduction,
    resize,
    shapes,
)
from lamella.ir.onnx.values import Handler

_DEFAULT = (
    activations,
    attention,
    contraction,
    convolution,
    creation,
    elementwise,
    indexing,
    integers,
    normalization,
    quantized,
    reduction,
    resize,
    shapes,
)

BUILDERS: Mapping[tuple[str, str], Handler] = MappingProxyType(
    {("", kind): build for module in _DEFAULT for kind, build in module.TABLE.items()}
    | {("com.microsoft", kind): build for kind, build in contrib.TABLE.items()}
)
"""Domain and operator -> the function that adds its nodes."""
