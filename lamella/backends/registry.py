"""The backends that Lamella brings along, loaded when they are asked for.

PyTorch's compiler and ONNX Runtime take seconds to import, and the latter need not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from lamella.backends.base import Backend
from lamella.errors import BackendError, known_names

HOMES: Mapping[str, tuple[str, str]] = {
    "onnxruntime": ("lamella.backends.onnxruntime.backend", "OnnxRuntimeBackend"),
    "eager": ("lamella.backends.torch.eager", "EagerBackend"),
    "eager-bfloat16": ("lamella.backends.torch.eager", "bfloat16_backend"),
    "aot": ("lamella.backends.torch.aot", "AotBackend"),
}
"""Name -> module and what makes the backend."""


def make_backend(name: str, plugins: Mapping[str, Callable[[], Backend]] | None = None) -> Backend:
    """The backend called `name`.

    Args:
        name: One of `HOMES`, or of `plugins`.
        plugins: More backends by name.

    Raises:
        BackendError: There is none of that name.
    """
    others = plugins or {}
    if name in others:
        return others[name]()
    if name not in HOMES:
        known = (*HOMES, *others)
        raise BackendError(f"unknown backend {name!r}{known_names(name, known)}")
    module, attribute = HOMES[name]
    return getattr(importlib.import_module(module), attribute)()
