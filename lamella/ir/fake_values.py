"""Fake values: the shape, dtype and device of what a node computes, without the data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir.torch_private import (
    FakeTensorMode,
    detect_fake_mode,
    enable_python_dispatcher,
    tree_map,
)

aten = torch.ops.aten


def mode_of(nodes: Iterable[Node]) -> FakeTensorMode:
    """The fake mode that the values of `nodes` live in, or a new one if they have none."""
    values = [node.meta["val"] for node in nodes if "val" in node.meta]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return detect_fake_mode(tensors) or FakeTensorMode(allow_non_fake_inputs=True)


def value_of(node: Node, mode: FakeTensorMode) -> Any:
    """The fake value of a call, computed from the fake values of what it reads."""

    def read(argument: Any) -> Any:
        return argument.meta["val"] if isinstance(argument, Node) else argument

    args = tree_map(read, node.args)
    kwargs = tree_map(read, node.kwargs)
    assert callable(node.target)
    # Padding by a symbolic size has only a Python implementation; elsewhere these are slower, and
    # that of `reshape` loses known sizes.
    padding = node.target in (aten.pad.default, aten.constant_pad_nd.default)
    python = enable_python_dispatcher() if padding else contextlib.nullcontext()
    with mode, torch.no_grad(), python:
        return node.target(*args, **kwargs)


def fake_of(value: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of the shape, layout and dtype of a weight; weights without data too."""
    device = "cpu" if value.device.type == "meta" else value.device
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
