"""Lamella compiles trained neural networks.

It finds out what every operation is worth, rewrites the model by it, and lowers the result to
something smaller and faster::

    compiled = lamella.compile(model, inputs, passes=["fold-norms", "quantize-weights bits=8"])
    compiled(**inputs)
    compiled.save("out")

Importing `lamella` is cheap: PyTorch is loaded when a name is used for the first time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamella.api import analyze, capture, compile, load, lower, transform
    from lamella.backends.artifact import verify
    from lamella.backends.base import Backend, Executable
    from lamella.checkpoints.save import save_checkpoint
    from lamella.data import Samples
    from lamella.errors import LamellaError
    from lamella.explanation.explaining import explain
    from lamella.ir.graph import Graph
    from lamella.passes.base import Analysis, Effect, Transform
    from lamella.report import Report

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "Backend",
    "Effect",
    "Executable",
    "Graph",
    "LamellaError",
    "Report",
    "Samples",
    "Transform",
    "__version__",
    "analyze",
    "capture",
    "compile",
    "explain",
    "load",
    "lower",
    "save_checkpoint",
    "transform",
    "verify",
]

_HOMES = {
    "Analysis": "lamella.passes.base",
    "Backend": "lamella.backends.base",
    "Effect": "lamella.passes.base",
    "Executable": "lamella.backends.base",
    "Graph": "lamella.ir.graph",
    "LamellaError": "lamella.errors",
    "Report": "lamella.report",
    "Samples": "lamella.data",
    "Transform": "lamella.passes.base",
    "analyze": "lamella.api",
    "capture": "lamella.api",
    "compile": "lamella.api",
    "explain": "lamella.explanation.explaining",
    "load": "lamella.api",
    "lower": "lamella.api",
    "save_checkpoint": "lamella.checkpoints.save",
    "transform": "lamella.api",
    "verify": "lamella.backends.artifact",
}


def __getattr__(name: str) -> Any:
    """A public name, from its module, at first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lamella' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
