"""Tensors from nothing: `aten.arange.start_step` and `aten.full` alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import dtype_of, is_tensor, shape_of, size_argument
from lamella.rewrite.pattern import Call, Match
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten


@rule(Call((aten.arange.default, aten.arange.start, aten.arange.start_step), ...))
def arange_in_full(graph: Graph, found: Match) -> Node | Skip:
    """``arange(n) -> arange(0, n, 1, dtype=...)``."""
    root = found.root
    given = {name: graph.operand(root, name) for name in ("end", "dtype")}
    start = graph.operand(root, "start") if root.target is not aten.arange.default else 0
    step = graph.operand(root, "step") if root.target is aten.arange.start_step else 1
    args = (start, given["end"], step)
    kwargs: dict[str, Any] = {"dtype": dtype_of(root)}
    if root.target is aten.arange.start_step and root.args == args and root.kwargs == kwargs:
        return Skip("everything is written out")
    return graph.call(aten.arange.start_step, *args, before=root, like=root, **kwargs)


_FILLED: dict[Any, int | float | None] = {
    aten.zeros.default: 0,
    aten.ones.default: 1,
    aten.empty.memory_format: 0,
    aten.full.default: None,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_empty.default: 0,
    aten.new_full.default: None,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.empty_like.default: 0,
    aten.full_like.default: None,
    aten.scalar_tensor.default: None,
}
"""Operator -> the value it fills with; None where it is an argument."""


@rule(Call(tuple(_FILLED), ...))
def filled_is_full(graph: Graph, found: Match) -> Node | Skip:
    """``zeros(size) -> full(size, 0, dtype=...)``, and so for `ones_like`, `new_full` and others.

    What `empty` holds is arbitrary, so that it may be zero.
    """
    root = found.root
    size, dtype = _size(graph, root), dtype_of(root)
    value = _FILLED[root.target]
    if value is None:
        name = "s" if root.target is aten.scalar_tensor.default else "fill_value"
        value = graph.operand(root, name)
    if isinstance(value, Node):
        return Skip("the value is computed")
    args = (size, _as(dtype, value))
    kwargs: dict[str, Any] = {"dtype": dtype}
    spelled = root.target is aten.full.default and root.args == args and root.kwargs == kwargs
    if spelled and type(root.args[1]) is type(args[1]):
        return Skip("everything is written out")
    return graph.call(aten.full.default, *args, before=root, like=root, **kwargs)


def _size(graph: Graph, node: Node) -> list[Any]:
    if node.target is aten.scalar_tensor.default:
        return []
    size = node.args[1] if str(node.target).startswith("aten.new_") else node.args[0]
    if is_tensor(size):
        source: Node = node.all_input_nodes[0]
        return [size_argument(graph, source, axis, node) for axis in range(len(shape_of(source)))]
    return list(graph.operand(node, "size"))


def _as(dtype: torch.dtype, value: Any) -> bool | int | float:
    if dtype == torch.bool:
        return bool(value)
    return float(value) if dtype.is_floating_point else int(value)


CREATION: tuple[Rule, ...] = (arange_in_full, filled_is_full)
