"""The rows of the new tokens, of values that depend on the length of the sequence alone.

A position table, a mask, a bias between positions is a value of the whole sequence; the new
tokens need its last rows. Cutting them off at the end would compute the whole table for every
token, so the cut is moved up to where the positions are made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.symbols import shape_of

aten = torch.ops.aten
_END = 2**63 - 1


@dataclass
class Rows:
    """Cuts values down to the rows of the new tokens.

    Attributes:
        graph: Whose values they are; edited.
        whole: Tells whether a size is that of the whole sequence.
        new: The number of new tokens, an integer node.
        past: The number of tokens before them.
        total: The sum of both.
        positions: Gives the input of positions for an integer value that counts tokens, or None.
    """

    graph: Graph
    whole: Callable[[Any], bool]
    new: Node
    past: Node
    total: Node
    positions: Callable[[Node], Node | None]
    _known: dict[tuple[Node, int, bool], Node] = field(default_factory=dict)

    def of(self, node: Node, axis: int, *, counted: bool = False) -> Node:
        """`node` with only the rows of the new tokens along `axis`.

        Args:
            node: A value that is as long as the whole sequence along `axis`.
            axis: Not negative.
            counted: Take positions from the input of positions where `node` comes from them.
        """
        key = (node, axis, counted)
        if key not in self._known:
            self._known[key] = self._cut(node, axis, counted)
        return self._known[key]

    def _cut(self, node: Node, axis: int, counted: bool) -> Node:
        if counted:
            given = self.positions(node)
            if given is not None:
                return given
        found = self._moved_up(node, axis, counted)
        return found if found is not None else self._sliced(node, axis)

    def _moved_up(self, node: Node, axis: int, counted: bool) -> Node | None:
        category = ops.facts(node.target)
        if category is not None and category.category in ("elementwise", "cast"):
            return self._elementwise(node, axis, counted)
        move = _MOVES.get(node.target)
        return None if move is None else move(self, node, axis, counted)

    def _elementwise(self, node: Node, axis: int, counted: bool) -> Node:
        rank = len(shape_of(node))

        def cut(source: Any) -> Any:
            if not isinstance(source, Node) or not (shape := shape_of(source)):
                return source
            own = axis - (rank - len(shape))
            has_rows = own >= 0 and self.whole(shape[own])
            return self.of(source, own, counted=counted) if has_rows else source

        args = [cut(a) for a in node.args]
        kwargs = {name: cut(a) for name, a in node.kwargs.items()}
        return self.again(node, *args, **kwargs)

    def again(self, node: Node, *args: Any, **kwargs: Any) -> Node:
        """The operator of `node` once more, on other arguments, right after it."""
        assert callable(node.target)
        return self.graph.call(node.target, *args, after=node, **kwargs)

    def _sliced(self, node: Node, axis: int) -> Node:
        after = self.past if node.op == "placeholder" else node
        return self.graph.call(aten.slice.Tensor, node, axis, self.past, _END, after=after)


def _arange(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    bound = ops.bind(node)
    if bound["start"] != 0 or bound["step"] != 1 or bound["end"] is not rows.total:
        return None
    return rows.again(node, rows.past, rows.total, **node.kwargs)


def _unsqueeze(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    source, dim = _source(node), ops.bind(node)["dim"] % len(shape_of(node))
    inner = rows.of(source, axis - (dim < axis), counted=counted)
    return rows.again(node, inner, dim)


def _permute(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    dims = [dim % len(shape_of(node)) for dim in ops.bind(node)["dims"]]
    return rows.again(node, rows.of(_source(node), dims[axis], counted=counted), dims)


def _transpose(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    bound, rank = ops.bind(node), len(shape_of(node))
    first, second = bound["dim0"] % rank, bound["dim1"] % rank
    own = {first: second, second: first}.get(axis, axis)
    return rows.again(node, rows.of(_source(node), own, counted=counted), first, second)


def _expand(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    source = _source(node)
    size = list(ops.bind(node)["size"])
    own = axis - (len(shape_of(node)) - len(shape_of(source)))
    if own >= 0 and rows.whole(shape_of(source)[own]):
        source = rows.of(source, own, counted=counted)
    size[axis] = rows.new
    return rows.again(node, source, size)


def _repeat(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    repeats = list(ops.bind(node)["repeats"])
    source = _source(node)
    own = axis - (len(repeats) - len(shape_of(source)))
    if repeats[axis] != 1 or own < 0:
        return None
    return rows.again(node, rows.of(source, own, counted=counted), repeats)


def _full(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    size = list(ops.bind(node)["size"])
    size[axis] = rows.new
    return rows.again(node, size, *node.args[1:], **node.kwargs)


def _embedding(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    bound = ops.bind(node)
    indices = bound["indices"]
    if axis >= len(shape_of(indices)):
        return None
    return rows.again(node, bound["weight"], rows.of(indices, axis, counted=counted))


def _index(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    bound = ops.bind(node)
    indices = list(bound["indices"])
    if len(indices) != 1 or axis >= len(shape_of(indices[0])):
        return None
    return rows.again(node, bound["self"], [rows.of(indices[0], axis, counted=counted)])


def _cat(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    bound = ops.bind(node)
    dim = bound["dim"] % len(shape_of(node))
    if dim == axis:
        return None
    return rows.again(node, [rows.of(p, axis, counted=counted) for p in bound["tensors"]], dim)


def _matmul(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    """Frequencies times positions: the axis of the positions is a batch or a free axis."""
    bound, rank = ops.bind(node), len(shape_of(node))
    left, right = bound["self"], bound["other"]
    if axis == rank - 1 and len(shape_of(right)) >= 2:
        cut = rows.of(right, len(shape_of(right)) - 1, counted=counted)
        return rows.again(node, left, cut)
    if axis == rank - 2 and len(shape_of(left)) >= 2:
        cut = rows.of(left, len(shape_of(left)) - 2, counted=counted)
        return rows.again(node, cut, right)
    return None


def _repeat_interleave(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    bound, rank = ops.bind(node), len(shape_of(node))
    if bound["dim"] is None or bound["dim"] % rank == axis:
        return None
    source = rows.of(bound["self"], axis, counted=counted)
    return rows.again(node, source, *node.args[1:], **node.kwargs)


def _slice(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    if ops.bind(node)["dim"] % len(shape_of(node)) == axis:
        return None
    source = rows.of(_source(node), axis, counted=counted)
    return rows.again(node, source, *node.args[1:], **node.kwargs)


def _piece(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    """One piece of a split along another axis."""
    split, place = node.args
    if not isinstance(split, Node) or split.target is not aten.split_with_sizes.default:
        return None
    bound = ops.bind(split)
    if bound["dim"] % len(shape_of(node)) == axis:
        return None
    cut = rows.of(bound["self"], axis, counted=counted)
    pieces = rows.again(split, cut, bound["split_sizes"], bound["dim"])
    return rows.graph.call(operator.getitem, pieces, place, after=pieces)


def _gather(rows: Rows, node: Node, axis: int, counted: bool) -> Node | None:
    """Rows of a table: those that the new tokens ask for."""
    bound, rank = ops.bind(node), len(shape_of(node))
    index, table = bound["index"], bound["self"]
    if bound["dim"] % rank != axis or rows.whole(shape_of(table)[axis]):
        return None
    cut = rows.of(index, axis, counted=counted)
    return rows.again(node, _as_many(rows, node, cut, axis), bound["dim"], cut)


def _as_many(rows: Rows, node: Node, index: Node, axis: int) -> Node:
    """The table of `node` for as many samples as `index` has: positions are those of each."""
    table = _source(node)
    pairs = list(zip(shape_of(table), shape_of(index), strict=True))
    wider = [i for i, (one, two) in enumerate(pairs) if i != axis and one == 1 and two != 1]
    if not wider:
        return table
    sizes: list[Any] = [-1] * len(pairs)
    for place in wider:
        sizes[place] = rows.graph.call(aten.sym_size.int, index, place, before=node)
    return rows.graph.call(aten.expand.default, table, sizes, before=node)


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


_Move = Callable[[Rows, Node, int, bool], Node | None]

_MOVES: dict[Any, _Move] = {
    aten.arange.start_step: _arange,
    aten.unsqueeze.default: _unsqueeze,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.slice.Tensor: _slice,
    operator.getitem: _piece,
    aten.gather.default: _gather,
    aten.full.default: _full,
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.cat.default: _cat,
    aten.matmul.default: _matmul,
}


def is_whole(total: Any) -> Callable[[Any], bool]:
    """Tells whether a size is that of the whole sequence, past and new."""
    return lambda size: isinstance(size, sympy.Expr) and size == total
