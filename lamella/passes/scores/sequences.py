"""Where the sequences of a batch lie in the values of a graph, and whether they stay apart.

A backward run of a batch gives every sequence the gradient of its own loss where no operation
mixes sequences. The axis of the batch is the one whose symbolic size has that of the inputs as a
factor; what is left to check are operations that act along it and leave its size as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
from torch import Tensor
from torch.fx import Node

from lamella.data import Batch
from lamella.ir import ops
from lamella.ir.axes import merged_batch, sizes_of, sizes_with
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.reach import data_inputs
from lamella.passes.scores.target import LossTarget
from lamella.passes.sites import Site
from lamella.rules.cost_elementwise import VIEWS
from lamella.rules.work import Call

_SEEN_BY_SHAPE = frozenset(
    {aten.linear.default, lam.linear_nbits.default, lam.linear_int8_static.default}
    | {aten.embedding.default, lam.embedding_nbits.default, aten.matmul.default}
    | {aten.einsum.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default}
    | {aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.select.int}
    | {aten.stack.default, aten.clone.default, operator.getitem}
    | {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.any.dim}
    | {aten.all.dim, aten.argmax.default, aten.prod.dim_int, aten.var.correction}
    | {aten.linalg_vector_norm.default}
)
"""Where they act along the batch, its size is gone from the result, or stands there twice."""

_IMAGES_FIRST = frozenset(
    {aten.conv1d.default, aten.conv2d.default, aten.conv_transpose2d.input}
    | {lam.conv_int8.default, aten.group_norm.default, aten.batch_norm.default}
    | {aten.pixel_shuffle.default}
)
"""They treat the entries of the first axis alike, each for itself."""

_ALONG_AN_AXIS = frozenset(
    {aten.cat.default, aten.slice.Tensor, aten.split_with_sizes.default, aten.roll.default}
    | {aten.flip.default, aten.cumsum.default, aten.softmax.int, aten.log_softmax.int}
    | {aten.gather.default, aten.index_select.default, aten.scatter.src, aten.scatter.value}
    | {aten.scatter_add.default, aten.topk.default, aten.sort.default}
    | {aten.repeat_interleave.self_int}
)


@dataclass(frozen=True)
class Sequences:
    """The places of the sequences in values that depend on them.

    Attributes:
        axes: Value -> the axis along which each sequence has as many entries, one sequence behind
            the other.
        shared: Readers of weights whose result all sequences share; it is only added to values
            of sequences, or the like, so that each sequence may have a copy.
    """

    axes: Mapping[Node, int]
    shared: frozenset[Node]


def find_sequences(graph: Graph, target: LossTarget, sites: Iterable[Site]) -> Sequences | str:
    """The sequences in all values that lead to a target, or what keeps them from being told apart.

    Args:
        graph: A canonical graph.
        target: The output that the loss is taken of.
        sites: Weights whose readers are asked for.
    """
    merged = merged_batch(graph)
    symbols = set(merged.values())
    if len(symbols) != 1:
        return "the inputs have no common axis for the batch"
    found = _Search(merged, symbols.pop())
    readers = {reader for site in sites for reader in site.readers}
    kept = [target.node] if target.mask is None else [target.node, target.mask]
    for node in _leading_to(graph, kept):
        if node.op == "placeholder":
            found.place(node)
        elif node.op == "call_function":
            found.visit(node, is_reader=node in readers)
        if found.reason:
            return found.reason
    if any(found.axes.get(node) != 0 for node in kept):
        return "the sequences of the compared output do not lie along its first axis"
    shared = frozenset(node for node in readers if node in found.shared)
    return found.reason or Sequences(found.axes, shared)


def _leading_to(graph: Graph, wanted: Iterable[Node]) -> list[Node]:
    """The values that the data of `wanted` comes from, in order."""
    needed: set[Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend(data_inputs(node))
    return [node for node in graph.nodes if node in needed]


class _Search:
    """Follows the axis of the batch from the inputs, and from readers of weights, to the target.

    Attributes:
        axes: The axis of the batch of each value that has one.
        shared: Values that depend on the weights of readers, and on no sequence.
        reason: Why sequences can't be told apart; empty as long as they can.
    """

    def __init__(self, merged: Mapping[sympy.Symbol, sympy.Symbol], batch: sympy.Symbol) -> None:
        self.axes: dict[Node, int] = {}
        self.shared: set[Node] = set()
        self.reason = ""
        self._merged, self._batch = merged, batch

    def place(self, node: Node) -> None:
        """An input."""
        if self._axis(node) != 0:
            self.reason = f"the batch is not the first axis of {node.name}"
        self.axes[node] = 0

    def visit(self, node: Node, *, is_reader: bool) -> None:
        """A call; what neither depends on a sequence nor on a reader is left out."""
        sources = data_inputs(node)
        batched = [one for one in sources if one in self.axes]
        lent = [one for one in sources if one in self.shared]
        if not (batched or lent or is_reader):
            return
        axis = self._axis(node)
        if axis is None and not batched:
            # A reader that is read by another shared value has no copy for each sequence.
            if lent:
                self.reason = self._mixed(node)
            self.shared.add(node)
            return
        if axis is None or not self._apart(node, batched, axis):
            self.reason = self._mixed(node)
            return
        if lent and not all(self._may_be_copied(one, node, axis) for one in lent):
            self.reason = self._mixed(node)
        self.axes[node] = axis

    def _mixed(self, node: Node) -> str:
        return f"{node.name} ({ops.op_name(node.target)}) may mix sequences or change their order"

    def _may_be_copied(self, value: Node, node: Node, axis: int) -> bool:
        """Whether `node` takes a copy of a shared value for each sequence instead of the value."""
        if axis != 0 or _category(node) != "elementwise":
            return False
        sizes, result = self._sizes(value), self._sizes(node)
        missing = len(result) - len(sizes)
        return result[0] == self._batch and (missing == 1 or (missing == 0 and sizes[0] == 1))

    def _sizes(self, node: Node) -> tuple[sympy.Expr, ...]:
        """The shape of a value, or of the first of several."""
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            tensors = [one for one in cast(Iterable[object], value) if isinstance(one, Tensor)]
            return sizes_of(tensors[0], self._merged) if tensors else ()
        return sizes_with(node, self._merged)

    def _axis(self, node: Node) -> int | None:
        """The only axis whose size depends on that of the batch, if it is a multiple of it."""
        sizes = self._sizes(node)
        places = [place for place, size in enumerate(sizes) if size.has(self._batch)]
        if len(places) != 1 or sympy.simplify(sizes[places[0]] / self._batch).has(self._batch):
            return None
        return places[0]

    def _apart(self, node: Node, batched: Sequence[Node], axis: int) -> bool:
        """Whether an operation that leaves the size of the batch leaves its sequences, too."""
        own = [self.axes[one] for one in batched]
        category, target = _category(node), node.target
        if category in ("elementwise", "cast") or target in _SEEN_BY_SHAPE:
            return True
        if category in ("attention", "pooling", "scan") or target in _IMAGES_FIRST:
            return axis == 0 and not any(own)
        if target is aten.reshape.default:
            return self._before(batched[0], own[0]) == self._before(node, axis)
        if target is aten.index.Tensor:
            return self._picks_within(node)
        if target is aten.slice.Tensor and self._sizes(batched[0]) == self._sizes(node):
            return True
        return all(one == axis for one in own) and axis in _left_alone(node, len(self._sizes(node)))

    def _before(self, node: Node, axis: int) -> sympy.Expr:
        """The product of the sizes in front of an axis."""
        product: Any = sympy.simplify(sympy.Mul(*self._sizes(node)[:axis]))
        return product

    def _picks_within(self, node: Node) -> bool:
        """Whether every sequence is indexed for itself."""
        operands = ops.bind(node)
        value: Node = operands["self"]
        if value not in self.axes:
            return True
        indices: Sequence[Node | None] = operands["indices"]
        picked = (*indices, *[None] * len(self._sizes(value)))[self.axes[value]]
        return picked is None or self._counts(picked)

    def _counts(self, node: Node) -> bool:
        """Whether a value is the number of each sequence."""
        while node.target in (aten.unsqueeze.default, aten.to.dtype):
            node = node.all_input_nodes[0]
        if node.target is not aten.arange.start_step or self._sizes(node) != (self._batch,):
            return False
        operands = ops.bind(node)
        return operands["start"] == 0 and operands.get("step", 1) == 1


def _category(node: Node) -> str:
    found = ops.facts(node.target)
    return "" if found is None else found.category


def _left_alone(node: Node, count: int) -> range | set[int]:
    """The axes of the result along which an operation neither mixes nor moves entries."""
    operands, target = ops.bind(node), node.target
    if target in (aten.layer_norm.default, aten.rms_norm.default):
        return range(count - len(operands["normalized_shape"]))
    if target in (aten.tril.default, aten.triu.default):
        return range(count - 2)
    if target in (aten.pad.default, aten.constant_pad_nd.default):
        return range(count - len(operands["pad"]) // 2)
    if target is aten.repeat.default:
        return {axis for axis, times in enumerate(operands["repeats"]) if times == 1}
    given = operands.get("dims", operands.get("dim"))
    if target not in _ALONG_AN_AXIS or given is None:
        return set()
    along = given if isinstance(given, list | tuple) else [given]
    return set(range(count)) - {int(axis) % count for axis in along}


@dataclass(frozen=True)
class HeldBytes:
    """The size of all values that a run computes.

    Attributes:
        total: Bytes, as an expression of the sizes of the inputs.
        sizes: The sizes of each input.
    """

    total: sympy.Expr
    sizes: Mapping[str, tuple[sympy.Expr, ...]]

    @classmethod
    def of(cls, graph: Graph, nodes: Iterable[Node]) -> HeldBytes:
        """Look at some nodes of a graph; views hold nothing."""
        merged = merged_batch(graph)
        calls = (Call(node, merged) for node in nodes if node.target not in VIEWS)
        inputs = zip(graph.signature.inputs, graph.inputs, strict=True)
        sizes = {name: sizes_with(node, merged) for name, node in inputs}
        return cls(sympy.Add(*(call.written_bytes() for call in calls)), sizes)

    def at(self, batch: Batch) -> int | None:
        """The bytes for a batch of tensors; None where sizes depend on its contents."""
        numbers = {
            size: sympy.Integer(length)
            for name, sizes in self.sizes.items()
            for size, length in zip(sizes, batch[name].shape, strict=True)
            if isinstance(size, sympy.Symbol)
        }
        total: Any = self.total.xreplace(numbers)
        return int(total) if total.is_number else None
