"""Fake values: the shape, dtype and device of what a node computes, without the data.

Computing one with symbolic sizes takes milliseconds. What was computed is remembered: for an
operator, its constants, and the shapes and dtypes of its operands, the shape and dtype of the
result. The memory belongs to a fake mode, which a graph shares with its copies.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir.symbols import size_of
from lamella.ir.torch_private import (
    FakeTensorMode,
    detect_fake_mode,
    enable_python_dispatcher,
    tree_map,
)

aten = torch.ops.aten

_SYMBOLIC_IN_PYTHON = frozenset(
    {
        aten.pad.default,
        aten.constant_pad_nd.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_bilinear2d.vec,
        aten.upsample_bicubic2d.vec,
    }
)
"""Operators that take symbolic sizes only in their Python implementations."""

_Cases = dict[Hashable, set[Hashable]]
_known: WeakKeyDictionary[FakeTensorMode, _Cases] = WeakKeyDictionary()
"""For every case the descriptions of its result that were found right."""


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
    # Elsewhere the Python implementations are slower, and that of `reshape` loses known sizes.
    needed = node.target in _SYMBOLIC_IN_PYTHON
    python = enable_python_dispatcher() if needed else contextlib.nullcontext()
    # Operators ask whether sizes are equal. The answer for the sample must not become a fact: with
    # a guard, two symbols would be one from here on, in every graph of this mode.
    sizes = mode.shape_env.suppress_guards() if mode.shape_env else contextlib.nullcontext()
    with mode, torch.no_grad(), python, sizes:
        return node.target(*args, **kwargs)


def fake_of(value: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of the shape, layout and dtype of a weight; weights without data too."""
    device = "cpu" if value.device.type == "meta" else value.device
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def is_known(node: Node, mode: FakeTensorMode) -> bool:
    """Whether the same operator gave this value on operands of these shapes before."""
    cases = _known.get(mode)
    return cases is not None and _described(node.meta["val"]) in cases.get(_case(node), ())


def remember(node: Node, mode: FakeTensorMode) -> None:
    """Take the value of `node` to be right, here and wherever the same case occurs."""
    cases = _known.setdefault(mode, defaultdict(set))
    cases[_case(node)].add(_described(node.meta["val"]))


def _case(node: Node) -> Hashable:
    return (node.target, _described(node.args), _described(node.kwargs))


def _described(value: Any) -> Hashable:
    """What a fake value depends on: shapes and dtypes of tensors, constants as they are."""
    if isinstance(value, Node):
        return _described(value.meta["val"])
    if isinstance(value, Tensor):
        return (value.dtype, value.device, tuple(map(size_of, value.shape)))
    if isinstance(value, torch.SymInt):
        return size_of(value)
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(item)) for name, item in value.items())
    return (type(value), value)
