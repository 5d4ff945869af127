"""Operators of programs that were decomposed before they came here (core ATen)."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import (
    dtype_of,
    is_tensor,
    same_shape,
    shape_of,
)
from lamella.rewrite.pattern import Call, Match, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten


@rule(Call((aten._softmax.default, aten._log_softmax.default), Var("x"), Var("dim"), Var("half")))
def decomposed_softmax(graph: Graph, found: Match) -> Node | Skip:
    """``_softmax(x, dim, False) -> softmax(x, dim)``, and so for `_log_softmax`."""
    root = found.root
    if found["half"]:
        return Skip("half precision becomes float on the way")
    plain = root.target is aten._softmax.default
    target = aten.softmax.int if plain else aten.log_softmax.int
    return graph.call(target, found["x"], found["dim"], before=root, like=root)


_SEVERAL = (
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.max_pool2d_with_indices.default,
    aten.native_dropout.default,
)


@rule(Call(operator.getitem, Call(_SEVERAL, ...), 0))
def first_of_several_results(graph: Graph, found: Match) -> Node | Skip:
    """``native_layer_norm(x, ...)[0] -> layer_norm(x, ...)``; so for the other norms, pooling."""
    root, whole = found.root, found.nodes[1]
    if whole.target is aten.native_dropout.default:
        return whole.args[0] if not whole.args[2] else Skip("the model was in training mode")
    target, args = _single(graph, whole)
    return graph.call(target, *args, before=root, like=root)


def _single(graph: Graph, node: Node) -> tuple[Any, tuple[Any, ...]]:
    def value(*names: str) -> tuple[Any, ...]:
        return tuple(graph.operand(node, name) for name in names)

    if node.target is aten.native_layer_norm.default:
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        return aten.layer_norm.default, value(*names)
    if node.target is aten.native_group_norm.default:
        x, groups, weight, bias, eps = value("input", "group", "weight", "bias", "eps")
        return aten.group_norm.default, (x, groups, weight, bias, eps)
    if node.target is aten.max_pool2d_with_indices.default:
        names = ("self", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return aten.max_pool2d.default, value(*names)
    names = ("input", "weight", "bias", "running_mean", "running_var")
    rest = value("momentum", "eps")
    return aten.batch_norm.default, (*value(*names), False, *rest, False)


@rule(Call(aten.convolution.default, ...))
def convolution_by_axes(graph: Graph, found: Match) -> Node | Skip:
    """``convolution(x, w, ...) -> conv1d``, `conv2d` or `conv_transpose2d`."""
    root = found.root
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed")
    x, w, bias, stride, padding, dilation, transposed = (graph.operand(root, n) for n in names)
    groups, ndim = graph.operand(root, "groups"), len(shape_of(x))
    if transposed and ndim == 4:
        extra = graph.operand(root, "output_padding")
        args = (x, w, bias, stride, padding, extra, groups, dilation)
        return graph.call(aten.conv_transpose2d.input, *args, before=root, like=root)
    if transposed or ndim not in (3, 4):
        return Skip(f"there is no canonical {'transposed ' * transposed}convolution of {ndim} axes")
    target = aten.conv1d.default if ndim == 3 else aten.conv2d.default
    args = (x, w, bias, stride, padding, dilation, groups)
    return graph.call(target, *args, before=root, like=root)


@rule(Call((aten.conv1d.padding, aten.conv2d.padding), Var("x"), Var("w"), Var("b"), ...))
def convolution_with_named_padding(graph: Graph, found: Match) -> Node | Skip:
    """``conv2d(x, w, padding="same") -> conv2d(x, w, padding=[...])``."""
    root, x, w = found.root, found["x"], found["w"]
    names = ("stride", "padding", "dilation", "groups")
    stride, padding, dilation, groups = (graph.operand(root, name) for name in names)
    axes = len(shape_of(x)) - 2
    kernel = shape_of(w)[2:]
    spread = list(dilation) * axes if len(dilation) == 1 else list(dilation)
    total = [step * (size - 1) for step, size in zip(spread, kernel, strict=True)]
    widths = [0] * axes if padding == "valid" else [width // 2 for width in total]
    if padding == "same" and any(width % 2 for width in total):
        around = [part for width in reversed(total) for part in (width // 2, width - width // 2)]
        x = graph.call(aten.pad.default, x, around, "constant", 0.0, before=root)
        widths = [0] * axes
    target = aten.conv1d.default if axes == 1 else aten.conv2d.default
    args = (x, w, found["b"], stride, widths, dilation, groups)
    return graph.call(target, *args, before=root, like=root)


@rule(Call(aten._adaptive_avg_pool2d.default, Var("x"), Var("size")))
def decomposed_pooling(graph: Graph, found: Match) -> Node:
    """``_adaptive_avg_pool2d(x, size) -> adaptive_avg_pool2d(x, size)``."""
    root, size = found.root, found["size"]
    return graph.call(aten.adaptive_avg_pool2d.default, found["x"], size, before=root, like=root)


@rule(Call(aten.empty_permuted.default, Var("size"), ...))
def decomposed_empty(graph: Graph, found: Match) -> Node:
    """``empty_permuted(size) -> full(size, 0)``: what it holds is arbitrary."""
    root = found.root
    zero = 0.0 if dtype_of(root).is_floating_point else 0
    return graph.call(
        aten.full.default, found["size"], zero, dtype=dtype_of(root), before=root, like=root
    )


@rule(
    Call(
        aten.reshape.default,
        Call(
            aten.matmul.default,
            Call(aten.reshape.default, Var("x"), Var("size_x")),
            Call(aten.reshape.default, Var("y"), Var("size_y")),
        ),
        Var("size"),
    )
)
def matmul_of_flat_batches(graph: Graph, found: Match) -> Node | Skip:
    """``reshape(matmul(reshape(x), reshape(y))) -> matmul(x, y)``, batches made one and back."""
    root, x, y = found.root, found["x"], found["y"]
    flat_x, flat_y = found.nodes[1].args[:2]
    for whole, flat in ((x, flat_x), (y, flat_y)):
        if not is_tensor(whole) or len(shape_of(flat)) != 3 or len(shape_of(whole)) < 4:
            return Skip(f"{flat.name} does not make one axis of several batches")
        if not same_shape(shape_of(whole)[-2:], shape_of(flat)[-2:]):
            return Skip(f"{flat.name} changes the matrices")
    if not same_shape(shape_of(x)[:-2], shape_of(y)[:-2]):
        return Skip("the factors had different batches")
    wanted = (*shape_of(x)[:-1], shape_of(y)[-1])
    if not same_shape(wanted, shape_of(root)):
        return Skip("the result has other axes than the factors")
    return graph.call(aten.matmul.default, x, y, before=root, like=root)


DECOMPOSED: tuple[Rule, ...] = (
    decomposed_softmax,
    first_of_several_results,
    convolution_by_axes,
    convolution_with_named_padding,
    decomposed_pooling,
    decomposed_empty,
    matmul_of_flat_batches,
)
