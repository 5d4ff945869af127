"""What depends on weights alone is computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.torch_private import tree_map
from lamella.rewrite.canonical.extents import (
    dtype_of,
    is_static,
    is_tensor,
    parts_of,
    shape_of,
    value_of,
)
from lamella.rewrite.pattern import Call, Match, Var
from lamella.rewrite.rule import Rule, rule

aten = torch.ops.aten

_GROWTH = 4
_SMALL_BYTES = 1 << 20
_TINY_BYTES = 4096
"""A weight that is not in memory is read for folding only if it is as small as this."""

_NOT_FOLDED = frozenset({"contraction", "attention", "scan"})
_NO_WORK = frozenset({"view", "creation", "cast", "shape"})


@rule(Call(aten._weight_norm.default, Var("v"), Var("g"), Var("dim")))
def weight_norm_is_product(graph: Graph, found: Match) -> Node:
    """``_weight_norm(v, g) -> v * (g / norm(v))``, the norm over all axes but `dim`."""
    root, v, g = found.root, found["v"], found["g"]
    axes = [axis for axis in range(len(shape_of(v))) if axis != found["dim"]]
    norm = graph.call(aten.linalg_vector_norm.default, v, 2, axes, True, before=root)
    ratio = graph.call(aten.div.Tensor, g, norm, before=root)
    return graph.call(aten.mul.Tensor, v, ratio, before=root, like=root)


WEIGHT_NORM: tuple[Rule, ...] = (weight_norm_is_product,)


def fold_constants(graph: Graph) -> int:
    """Replace expressions of loaded weights and constants by their value; how many.

    An expression is folded as a whole, where something else reads its result. Left alone are
    mere views of a weight (the checkpoint knows it by name), products of matrices (passes want
    to see them), and what is larger than four times the weights it comes from and a megabyte.
    """
    cones = _constant_cones(graph)
    frontier = [
        node
        for node, cone in cones.items()
        if node.op == "call_function"
        and is_tensor(node)
        and _does_work(cone)
        and any(user not in cones for user in node.users)
    ]
    for node in frontier:
        value = _compute(graph, node, {})
        sources = [other for other in cones[node] if other.op == "get_attr"]
        with graph.author("fold_constants"):
            folded = graph.add_weight(_free_name(graph, sources), value.contiguous())
        graph.replace(node, folded)
    if frontier:
        graph.prune()
    return len(frontier)


def _constant_cones(graph: Graph) -> dict[Node, frozenset[Node]]:
    """Every constant node -> the nodes it is computed from, itself among them."""
    cones: dict[Node, frozenset[Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            if graph.is_loaded(node) or _is_tiny(graph, node):
                cones[node] = frozenset({node})
        elif node.op == "call_function" and all(one in cones for one in node.all_input_nodes):
            parts = [cones[one] for one in node.all_input_nodes]
            cone = frozenset({node}).union(*parts)
            if _may_fold(node) and _is_bounded(node, cone):
                cones[node] = cone
    return cones


def _is_tiny(graph: Graph, node: Node) -> bool:
    source = graph.source
    known = source is not None and str(node.target) in source.names()
    return known and _nbytes(node) <= _TINY_BYTES


def _may_fold(node: Node) -> bool:
    facts = ops.facts(node.target)
    if facts is None or facts.category in _NOT_FOLDED or not ops.is_pure(node):
        return False
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return all(isinstance(part, Tensor) and is_static(part.shape) for part in value)
    return is_tensor(node) and is_static(shape_of(node))


def _is_bounded(node: Node, cone: frozenset[Node]) -> bool:
    if not is_tensor(node):
        return True
    sources = sum(_nbytes(other) for other in cone if other.op == "get_attr")
    return _nbytes(node) <= max(_GROWTH * sources, _SMALL_BYTES)


def _does_work(cone: frozenset[Node]) -> bool:
    for node in cone:
        facts = ops.facts(node.target) if node.op == "call_function" else None
        if facts is not None and facts.category not in _NO_WORK:
            return True
    return False


def _nbytes(node: Node) -> int:
    size = dtype_of(node).itemsize
    return size * int(value_of(node).numel())


def _compute(graph: Graph, node: Node, known: dict[Node, Any]) -> Any:
    if node.op == "get_attr":
        return graph.weight(node)
    if node not in known:

        def value(argument: Any) -> Any:
            return _compute(graph, argument, known) if isinstance(argument, Node) else argument

        target, args, kwargs = parts_of(node)
        with torch.no_grad():
            known[node] = target(*tree_map(value, args), **tree_map(value, kwargs))
    return known[node]


def _free_name(graph: Graph, sources: list[Node]) -> str:
    order = {node: place for place, node in enumerate(graph.weight_nodes())}
    first = min(sources, key=order.__getitem__, default=None)
    base = f"{first.target}_folded" if first is not None else "constant_folded"
    taken = {str(node.target) for node in graph.weight_nodes()}
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name
