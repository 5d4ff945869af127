"""Tensors at dotted names of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tensor_at(module: torch.nn.Module, name: str) -> Tensor | None:
    """The tensor at a dotted name of `module`, or None when there is none."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None


def set_tensor(module: torch.nn.Module, name: str, value: Tensor) -> None:
    """Put `value` at a dotted name of `module`, making the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if hasattr(module, leaf):
        delattr(module, leaf)
    module.register_buffer(leaf, value)
