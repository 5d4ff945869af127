"""Nodes that compute the same become one."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import is_tensor, same_extent, shape_of
from lamella.rewrite.pattern import Call, Match, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten


def share(graph: Graph) -> int:
    """Let equal calls with equal arguments be one node; how many nodes went.

    Every block asks for its own ``unsqueeze(cos)``, its own sizes and masks; after this they
    are side inputs that the blocks have in common.
    """
    seen: dict[Any, Node] = {}
    shared = 0
    for node in graph.nodes:
        if node.op != "call_function" or not ops.is_pure(node) or not node.users:
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            graph.replace(node, first)
            shared += 1
    if shared:
        graph.prune()
    return shared


def _key(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple(sorted((name, _key(part)) for name, part in value.items()))
    # 1, 1.0 and True are equal in Python and are not the same constant.
    return (type(value), value)


@rule(Call(aten.sym_size.int, Var("x"), Var("dim")))
def size_of_input(graph: Graph, found: Match) -> Node | Skip:
    """``sym_size(x, dim) -> sym_size(input, axis)``, where an input has that size.

    A size read from the middle of the model would keep alive what a pass drops.
    """
    root = found.root
    size = root.meta["val"]
    if not isinstance(size, SymInt):
        return Skip("the size is fixed")
    for source in graph.inputs:
        for axis, known in enumerate(shape_of(source) if is_tensor(source) else ()):
            if isinstance(known, SymInt) and same_extent(known, size):
                if root.args == (source, axis):
                    return Skip("it is the size of an input")
                return graph.call(aten.sym_size.int, source, axis, before=root, like=root)
    return Skip("no input has that size")


SIZES: tuple[Rule, ...] = (size_of_input,)
