"""Views: one spelling each of reshape, transpose, split and slice, and none without effect."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonical.extents import (
    LAST,
    axis_of,
    is_static,
    is_tensor,
    parts_of,
    same_extent,
    same_shape,
    shape_of,
    size_argument,
    size_arguments,
)
from lamella.rewrite.pattern import Call, Match, Var
from lamella.rewrite.rule import Rule, Skip, rule

aten = torch.ops.aten


@rule(Call((aten.view.default, aten._unsafe_view.default), Var("x"), Var("size")))
def view_is_reshape(graph: Graph, found: Match) -> Node:
    """``view(x, size) -> reshape(x, size)``."""
    root = found.root
    return graph.call(aten.reshape.default, found["x"], found["size"], before=root, like=root)


@rule(
    Call(
        (
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.view_as.default,
            aten.reshape_as.default,
            aten._reshape_alias.default,
        ),
        Var("x"),
        ...,
    )
)
def flatten_is_reshape(graph: Graph, found: Match) -> Node | Skip:
    """``flatten(x, i, j) -> reshape(x, size)``, and so for `unflatten` and `view_as`."""
    root, x = found.root, found["x"]
    sources = [node for node in root.all_input_nodes if is_tensor(node)]
    size = size_arguments(graph, shape_of(root), sources, root)
    if size is None:
        return Skip("more than one size of the result is none of the operands'")
    return graph.call(aten.reshape.default, x, size, before=root, like=root)


@rule(Call(aten.reshape.default, Call(aten.reshape.default, Var("x"), Var("first")), Var("size")))
def reshape_of_reshape(graph: Graph, found: Match) -> Node:
    """``reshape(reshape(x, a), b) -> reshape(x, b)``."""
    root = found.root
    return graph.call(aten.reshape.default, found["x"], found["size"], before=root, like=root)


@rule(Call((aten.reshape.default, aten.expand.default), Var("x"), ...))
def reshape_to_same_shape(graph: Graph, found: Match) -> Node | Skip:
    """``reshape(x, shape of x) -> x``, and so for `expand`."""
    x: Node = found["x"]
    if not same_shape(shape_of(x), shape_of(found.root)):
        return Skip("the shape changes")
    return x


@rule(Call((aten.expand_as.default, aten.broadcast_to.default), Var("x"), Var("other")))
def expand_as_is_expand(graph: Graph, found: Match) -> Node | Skip:
    """``expand_as(x, y) -> expand(x, shape of y)``."""
    root, other = found.root, found["other"]
    if isinstance(other, Node):
        other = [size_argument(graph, other, axis, root) for axis in range(len(shape_of(other)))]
    return graph.call(aten.expand.default, found["x"], other, before=root, like=root)


@rule(Call(aten.expand.default, Call(aten.expand.default, Var("x"), ...), Var("size"), ...))
def expand_of_expand(graph: Graph, found: Match) -> Node | Skip:
    """``expand(expand(x, a), b) -> expand(x, b)``."""
    if any(isinstance(size, int) and size == -1 for size in found["size"]):
        return Skip("the outer expansion keeps an axis (-1)")
    root = found.root
    return graph.call(aten.expand.default, found["x"], found["size"], before=root, like=root)


_TURNS = (
    aten.t.default,
    aten.mT.default,
    aten.numpy_T.default,
    aten.matrix_H.default,
    aten.adjoint.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    aten.swapaxes.default,
    aten.swapdims.default,
)


@rule(Call(_TURNS, Var("x"), ...))
def turn_is_permute(graph: Graph, found: Match) -> Node | Skip:
    """``t(x) -> permute(x, [1, 0])``, and so for `mT`, `movedim`, `swapaxes` and others."""
    root, x = found.root, found["x"]
    if len(shape_of(x)) < 2:
        return x
    # Run on an empty tensor whose axes have distinct sizes, to see where each axis goes.
    probe = torch.empty(tuple(range(2, 2 + len(shape_of(x)))), device="meta")
    target, (_, *rest), kwargs = parts_of(root)
    order = [size - 2 for size in target(probe, *rest, **kwargs).shape]
    return graph.call(aten.permute.default, x, order, before=root, like=root)


@rule(Call(aten.permute.default, Var("x"), Var("dims")))
def permute_of_two_axes(graph: Graph, found: Match) -> Node | Skip:
    """``permute(x, [.., j, .., i, ..]) -> transpose(x, i, j)``, the identity ``-> x``."""
    x, order = found["x"], _order(found["dims"])
    moved = [axis for axis, source in enumerate(order) if axis != source]
    if not moved:
        return x
    if len(moved) != 2:
        return Skip("more than two axes move")
    root = found.root
    return graph.call(aten.transpose.int, x, moved[0], moved[1], before=root, like=root)


@rule(Call(aten.transpose.int, Var("x"), Var("one"), Var("two")))
def transpose_in_order(graph: Graph, found: Match) -> Node | Skip:
    """``transpose(x, -1, -2) -> transpose(x, 2, 3)``: axes from the front, in order."""
    x, one, two = found["x"], found["one"], found["two"]
    ndim = len(shape_of(x))
    if ndim < 2:
        return x
    first, second = sorted((axis_of(one, ndim), axis_of(two, ndim)))
    if first == second:
        return x
    if (first, second) == (one, two):
        return Skip("the axes are in order")
    return graph.call(aten.transpose.int, x, first, second, before=found.root, like=found.root)


_ORDER = (aten.transpose.int, aten.permute.default)


@rule(Call(_ORDER, Call(_ORDER, Var("x"), ...), ...))
def permute_of_permute(graph: Graph, found: Match) -> Node:
    """``permute(permute(x, a), b) -> permute(x, a[b])``; a pair that undoes itself ``-> x``."""
    inner = found.nodes[1]
    first, second = _permutation(inner), _permutation(found.root)
    order = [first[axis] for axis in second]
    if order == sorted(order):
        return found["x"]
    root = found.root
    return graph.call(aten.permute.default, found["x"], order, before=root, like=root)


def _permutation(node: Node) -> list[int]:
    ndim = len(shape_of(node))
    if node.target is aten.permute.default:
        return _order(node.args[1])
    order = list(range(ndim))
    _, (_, *dims), _ = parts_of(node)
    one, two = (axis_of(dim, ndim) for dim in dims)
    order[one], order[two] = order[two], order[one]
    return order


def _order(dims: Any) -> list[int]:
    return [axis_of(dim, len(dims)) for dim in dims]


@rule(Call(aten.slice.Tensor, Var("x"), ...))
def slice_of_all(graph: Graph, found: Match) -> Node | Skip:
    """``x[0:size] -> x``; otherwise the bounds are written out."""
    root, x = found.root, found["x"]
    dim, start, stop, step = (graph.operand(root, n) for n in ("dim", "start", "end", "step"))
    axis = axis_of(dim, len(shape_of(x)))
    start, stop = (0 if start is None else start), (LAST if stop is None else stop)
    same = same_extent(shape_of(x)[axis], shape_of(root)[axis])
    if same and step == 1 and start == 0:
        return x
    spelled = (x, axis, start, stop) if step == 1 else (x, axis, start, stop, step)
    if spelled == root.args and not root.kwargs:
        return Skip("a part is taken")
    return graph.call(aten.slice.Tensor, *spelled, before=root, like=root)


@rule(Call(aten.narrow.default, Var("x"), Var("dim"), Var("start"), Var("length")))
def narrow_is_slice(graph: Graph, found: Match) -> Node:
    """``narrow(x, dim, start, n) -> x[start : start + n]``."""
    root, start, length = found.root, found["start"], found["length"]
    if isinstance(start, int) and isinstance(length, int):
        stop: int | Node = start + length
    else:
        stop = graph.call(operator.add, start, length, before=root)
    return graph.call(
        aten.slice.Tensor, found["x"], found["dim"], start, stop, before=root, like=root
    )


_CHUNKS = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)


@rule(Call(operator.getitem, Call(_CHUNKS, Var("x"), ...), Var("index")))
def chunk_is_split_with_sizes(graph: Graph, found: Match) -> Node | Skip:
    """``chunk(x, n, dim)[i] -> split_with_sizes(x, sizes, dim)[i]``, and so for `split`."""
    root, whole, x = found.root, found.nodes[1], found["x"]
    axis = axis_of(graph.operand(whole, "dim"), len(shape_of(x)))
    sizes = [part.shape[axis] for part in whole.meta["val"]]
    if len(sizes) == 1:
        return x
    if not is_static(sizes):
        return _part_as_slice(graph, found, axis)
    if whole.target is aten.split_with_sizes.default and whole.args == (x, sizes, axis):
        return Skip("the sizes are written out")
    parts = graph.call(aten.split_with_sizes.default, x, sizes, axis, before=whole, like=whole)
    return graph.call(operator.getitem, parts, found["index"], before=root, like=root)


def _part_as_slice(graph: Graph, found: Match, axis: int) -> Node | Skip:
    """A part of an axis of symbolic size."""
    root, whole, x, index = found.root, found.nodes[1], found["x"], found["index"]
    length: Any
    if whole.target in (aten.split.Tensor, aten.unsafe_split.Tensor):
        length = graph.operand(whole, "split_size")
    elif whole.target in (aten.chunk.default, aten.unsafe_chunk.default):
        # The length of a chunk is the size by the number of chunks, rounded up.
        count = graph.operand(whole, "chunks")
        size = size_argument(graph, x, axis, root)
        more = graph.call(operator.add, size, count - 1, before=root)
        length = graph.call(operator.floordiv, more, count, before=root)
    else:
        return Skip(f"the parts of {whole.name} have no fixed size")
    start = _times(graph, length, index, root)
    stop = LAST if index == len(whole.meta["val"]) - 1 else _times(graph, length, index + 1, root)
    return graph.call(aten.slice.Tensor, x, axis, start, stop, before=root, like=root)


def _times(graph: Graph, length: int | Node, count: int, before: Node) -> int | Node:
    if isinstance(length, int) or count == 0:
        return 0 if count == 0 else int(length) * count  # pyright: ignore[reportArgumentType]
    return length if count == 1 else graph.call(operator.mul, length, count, before=before)


@rule(Call(operator.getitem, Call(aten.unbind.int, Var("x"), ...), Var("index")))
def unbind_is_select(graph: Graph, found: Match) -> Node:
    """``unbind(x, dim)[i] -> select(x, dim, i)``."""
    root, whole, x = found.root, found.nodes[1], found["x"]
    axis = axis_of(graph.operand(whole, "dim"), len(shape_of(x)))
    return graph.call(aten.select.int, x, axis, found["index"], before=root, like=root)


@rule(Call(aten.squeeze.default, Var("x")))
def squeeze_is_squeeze_dims(graph: Graph, found: Match) -> Node | Skip:
    """``squeeze(x) -> squeeze(x, axes of size 1)``."""
    root, x = found.root, found["x"]
    axes = [axis for axis, size in enumerate(shape_of(x)) if size == 1 and isinstance(size, int)]
    if len(shape_of(x)) - len(axes) != len(shape_of(root)):
        return Skip("an axis of symbolic size is squeezed")
    return graph.call(aten.squeeze.dims, x, axes, before=root, like=root)


@rule(Call(aten.squeeze.dims, Var("x"), [Var("dim")]))
def squeeze_of_one_axis(graph: Graph, found: Match) -> Node:
    """``squeeze(x, [dim]) -> squeeze(x, dim)``."""
    root = found.root
    return graph.call(aten.squeeze.dim, found["x"], found["dim"], before=root, like=root)


@rule(Call(aten.squeeze.dim, Call(aten.unsqueeze.default, Var("x"), Var("there")), Var("back")))
def squeeze_of_unsqueeze(graph: Graph, found: Match) -> Node | Skip:
    """``squeeze(unsqueeze(x, i), i) -> x``."""
    ndim = len(shape_of(found.nodes[1]))
    if axis_of(found["there"], ndim) != axis_of(found["back"], ndim):
        return Skip("another axis is squeezed")
    return found["x"]


@rule(Call(aten.unsqueeze.default, Call(aten.squeeze.dim, Var("x"), Var("there")), Var("back")))
def unsqueeze_of_squeeze(graph: Graph, found: Match) -> Node | Skip:
    """``unsqueeze(squeeze(x, i), i) -> x``, where axis `i` has size 1."""
    ndim = len(shape_of(found["x"]))
    if len(shape_of(found.root)) != ndim:
        return Skip("the axis that is squeezed is longer than 1")
    if axis_of(found["there"], ndim) != axis_of(found["back"], ndim):
        return Skip("another axis is added")
    return found["x"]


@rule(Call(aten.squeeze.dim, Var("x"), Var("dim")))
def squeeze_of_long_axis(graph: Graph, found: Match) -> Node | Skip:
    """``squeeze(x, dim) -> x``, where the axis is longer than 1."""
    if len(shape_of(found.root)) != len(shape_of(found["x"])):
        return Skip("the axis has size 1")
    return found["x"]


@rule(Call(aten.repeat.default, Var("x"), Var("repeats")))
def repeat_once(graph: Graph, found: Match) -> Node | Skip:
    """``repeat(x, [1, 1, ...]) -> x``."""
    if len(found["repeats"]) != len(shape_of(found["x"])) or any(
        isinstance(times, Node) or times != 1 for times in found["repeats"]
    ):
        return Skip("an axis is repeated")
    return found["x"]


@rule(Call(aten.tile.default, Var("x"), Var("repeats")))
def tile_is_repeat(graph: Graph, found: Match) -> Node:
    """``tile(x, dims) -> repeat(x, dims)``, with leading ones."""
    root, x, repeats = found.root, found["x"], list(found["repeats"])
    ones = [1] * (len(shape_of(x)) - len(repeats))
    return graph.call(aten.repeat.default, x, [*ones, *repeats], before=root, like=root)


@rule(Call(aten.constant_pad_nd.default, Var("x"), Var("pad"), ...))
def constant_pad_is_pad(graph: Graph, found: Match) -> Node:
    """``constant_pad_nd(x, pad, value) -> pad(x, pad, "constant", value)``."""
    root = found.root
    value = float(graph.operand(root, "value"))
    return graph.call(
        aten.pad.default, found["x"], found["pad"], "constant", value, before=root, like=root
    )


@rule(Call(aten.pad.default, Var("x"), Var("pad"), ...))
def pad_by_nothing(graph: Graph, found: Match) -> Node | Skip:
    """``pad(x, [0, 0, ...]) -> x``."""
    if any(isinstance(width, Node) or width != 0 for width in found["pad"]):
        return Skip("an axis is padded")
    return found["x"]


@rule(Call(aten.cat.default, [Var("x")], ...))
def cat_of_one(graph: Graph, found: Match) -> Node:
    """``cat([x]) -> x``."""
    return found["x"]


@rule(Call(aten.diff.default, Var("x"), 1, Var("dim"), Var("prepend"), Var("append")))
def diff_is_difference(graph: Graph, found: Match) -> Node | Skip:
    """``diff(x) -> x[1:] - x[:-1]``, after what is prepended and appended."""
    root, x = found.root, found["x"]
    if not is_tensor(x) or str(root.meta["val"].dtype) == "torch.bool":
        return Skip("the difference of booleans is their exclusive or")
    axis = axis_of(found["dim"], len(shape_of(x)))
    parts = [part for part in (found["prepend"], x, found["append"]) if part is not None]
    whole = graph.call(aten.cat.default, parts, axis, before=root) if len(parts) > 1 else x
    later = graph.call(aten.slice.Tensor, whole, axis, 1, LAST, before=root)
    sooner = graph.call(aten.slice.Tensor, whole, axis, 0, -1, before=root)
    return graph.call(aten.sub.Tensor, later, sooner, before=root, like=root)


VIEWS: tuple[Rule, ...] = (
    view_is_reshape,
    flatten_is_reshape,
    reshape_to_same_shape,
    reshape_of_reshape,
    expand_as_is_expand,
    expand_of_expand,
    turn_is_permute,
    permute_of_two_axes,
    transpose_in_order,
    permute_of_permute,
    slice_of_all,
    narrow_is_slice,
    chunk_is_split_with_sizes,
    unbind_is_select,
    squeeze_is_squeeze_dims,
    squeeze_of_one_axis,
    squeeze_of_unsqueeze,
    unsqueeze_of_squeeze,
    squeeze_of_long_axis,
    repeat_once,
    tile_is_repeat,
    constant_pad_is_pad,
    pad_by_nothing,
    cat_of_one,
    diff_is_difference,
)
