"""Products of matrices: `aten.linear` where one factor is a weight, else `aten.matmul`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import (
    dtype_of,
    is_tensor,
    parts_of,
    same_shape,
    shape_of,
    value_of,
)
from lamella.rewrite.pattern import Call, Match, Number, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)


@rule(Call(_PRODUCTS, Var("x"), Var("y")))
def product_is_matmul(graph: Graph, found: Match) -> Node:
    """``mm(x, y) -> matmul(x, y)``, and so for `bmm`, `mv` and `dot`."""
    root = found.root
    return graph.call(aten.matmul.default, found["x"], found["y"], before=root, like=root)


_SUMS = (aten.addmm.default, aten.baddbmm.default, aten.addmv.default)


@rule(Call(_SUMS, Var("b"), Var("x"), Var("y"), beta=Number("beta"), alpha=Number("alpha")))
def addmm_is_sum(graph: Graph, found: Match) -> Node:
    """``addmm(b, x, y) -> matmul(x, y) + b``, with its factors where they are not 1."""
    root, bias = found.root, found["b"]
    product = graph.call(aten.matmul.default, found["x"], found["y"], before=root)
    if found["alpha"] != 1:
        product = graph.call(aten.mul.Tensor, product, found["alpha"], before=root)
    if found["beta"] == 0:
        return product
    if found["beta"] != 1:
        bias = graph.call(aten.mul.Tensor, bias, found["beta"], before=root)
    return graph.call(aten.add.Tensor, product, bias, before=root, like=root)


@rule(Call(aten.matmul.default, Var("x"), Call(aten.transpose.int, Var("w"), 0, 1)))
def matmul_of_turned_weight(graph: Graph, found: Match) -> Node | Skip:
    """``matmul(x, transpose(w)) -> linear(x, w)``, where `w` is a weight."""
    x, w, root = found["x"], found["w"], found.root
    if not _is_matrix_weight(w):
        return Skip("neither factor is a weight")
    if not shape_of(x):
        return Skip("the other factor is a scalar")
    return graph.call(aten.linear.default, x, w, before=root, like=root)


@rule(Call(aten.matmul.default, Var("w"), Var("x")))
def matmul_of_weight_before(graph: Graph, found: Match) -> Node | Skip:
    """``matmul(w, x) -> transpose(linear(transpose(x), w))``, where `w` is a weight."""
    w, x, root = found["w"], found["x"], found.root
    if not _is_matrix_weight(w):
        return Skip("the first factor is no weight")
    last = len(shape_of(x)) - 1
    if last < 1:
        return graph.call(aten.linear.default, x, w, before=root, like=root)
    turned = graph.call(aten.transpose.int, x, last - 1, last, before=root)
    product = graph.call(aten.linear.default, turned, w, before=root)
    return graph.call(aten.transpose.int, product, last - 1, last, before=root, like=root)


@rule(Call(aten.add.Tensor, Call(aten.linear.default, Var("x"), Var("w")), Var("b")))
def linear_with_bias(graph: Graph, found: Match) -> Node | Skip:
    """``linear(x, w) + b -> linear(x, w, b)``, where `b` is a weight with one value per row."""
    w, bias, root = found["w"], found["b"], found.root
    if not isinstance(bias, Node) or bias.op != "get_attr":
        return Skip("what is added is no weight")
    if not is_tensor(w) or not same_shape(shape_of(bias), shape_of(w)[:1]):
        return Skip(f"{bias.name} does not have one value per row of {w.name}")
    return graph.call(aten.linear.default, found["x"], w, bias, before=root, like=root)


CONTRACTIONS: tuple[Rule, ...] = (
    product_is_matmul,
    addmm_is_sum,
    matmul_of_turned_weight,
    matmul_of_weight_before,
    linear_with_bias,
)


def raise_linears(graph: Graph) -> int:
    """``matmul(x, w) -> linear(x, w)`` with the weight turned, where all its readers agree.

    The weight becomes its transposed view, and the origin remembers that the checkpoint
    stores it the other way round. A weight that something else reads too stays.

    Returns:
        How many products became linear layers.
    """
    raised = 0
    for node in graph.weight_nodes():
        if not _is_matrix_weight(node) or not node.users:
            continue
        readers = list(node.users)
        if not all(_multiplies_by(reader, node) for reader in readers):
            continue
        turn_weight(graph, node)
        for reader in readers:
            with graph.author("raise_linears"):
                new = graph.call(
                    aten.linear.default, reader.args[0], node, before=reader, like=reader
                )
            graph.replace(reader, new)
        raised += len(readers)
    if raised:
        graph.prune()
    return raised


def turn_weight(graph: Graph, node: Node) -> None:
    """Exchange the last two axes of a weight, and remember it; the storage is shared.

    The readers of the weight are the caller's business.
    """
    name = str(node.target)
    shape, dtype = value_of(node).shape, dtype_of(node)
    loaded = graph.is_loaded(node)
    value = graph.weight(node) if loaded else torch.empty(shape, dtype=dtype, device="meta")
    graph.set_weight(node, value.mT)
    graph.origin = dataclasses.replace(graph.origin, transposed=graph.origin.transposed ^ {name})


def _is_matrix_weight(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr" and len(shape_of(node)) == 2


def _multiplies_by(reader: Node, weight: Node) -> bool:
    if reader.target is not aten.matmul.default:
        return False
    _, (x, w), _ = parts_of(reader)
    return w is weight and x is not weight and is_tensor(x) and len(shape_of(x)) > 0
