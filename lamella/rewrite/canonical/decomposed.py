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
        x, train = graph.operand(whole, "input"), graph.operand(whole, "train")
        return Skip("the model was captured in training mode") if train else x
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
    root, product = found.root, found.nodes[1]
    batches = shape_of(root)[:-2]
    if not same_shape(shape_of(product)[-2:], shape_of(root)[-2:]) or len(batches) < 2:
        return Skip("the result is not the product with several batches")
    factors: list[Node] = []
    for which, flat in zip("xy", product.args[:2], strict=True):
        whole, size = found[which], found[f"size_{which}"]
        assert isinstance(flat, Node)
        if len(shape_of(flat)) != 3 or not same_shape(shape_of(whole)[-2:], shape_of(flat)[-2:]):
            return Skip(f"{flat.name} does more than to make one axis of several batches")
        if not same_shape(shape_of(whole)[:-2], batches):
            size = [*found["size"][:-2], *size[-2:]]
            if sum(part == -1 for part in size) > 1:
                return Skip(f"the batches of {flat.name} can't be told")
            whole = graph.call(aten.reshape.default, whole, size, before=root)
        factors.append(whole)
    return graph.call(aten.matmul.default, *factors, before=root, like=root)


@rule(Call(aten.matmul.default, Var("x"), Call(aten.expand.default, Var("y"), ...)))
def matmul_of_expanded(graph: Graph, found: Match) -> Node | Skip:
    """``matmul(x, expand(y)) -> matmul(x, y)``, where `x` has the batches: they broadcast."""
    root, x, y = found.root, found["x"], found["y"]
    wide = shape_of(found.nodes[1])
    if not is_tensor(x) or len(shape_of(y)) < 2 or len(wide) < 3:
        return Skip("there are no batches")
    if not same_shape(shape_of(y)[-2:], wide[-2:]):
        return Skip("the matrices are expanded")
    if not same_shape(shape_of(x)[:-2], wide[:-2]):
        return Skip("the other factor does not have the batches")
    return graph.call(aten.matmul.default, x, y, before=root, like=root)


@rule(Call(aten.where.self, Var("condition"), Var("x"), Var("y")))
def where_of_constant(graph: Graph, found: Match) -> Node | Skip:
    """``where(c, full(size, 0), y) -> where(c, 0, y)``, and so for the other operand."""
    root, x, y = found.root, found["x"], found["y"]
    full = [node.target is aten.full.default for node in (x, y)]
    if full[0] == full[1]:
        return Skip("none of the operands is a constant, or both are")
    constant, other = (x, y) if full[0] else (y, x)
    if dtype_of(constant) != dtype_of(other):
        return Skip("the operands differ in dtype")
    condition, value = found["condition"], constant.args[1]
    if not any(same_shape(shape_of(node), shape_of(root)) for node in (condition, other)):
        return Skip("the constant is larger than the other operand")
    if full[0]:
        return graph.call(aten.where.ScalarSelf, condition, value, y, before=root, like=root)
    return graph.call(aten.where.ScalarOther, condition, x, value, before=root, like=root)


DECOMPOSED: tuple[Rule, ...] = (
    decomposed_softmax,
    first_of_several_results,
    convolution_by_axes,
    convolution_with_named_padding,
    decomposed_pooling,
    decomposed_empty,
    matmul_of_flat_batches,
    matmul_of_expanded,
    where_of_constant,
)
