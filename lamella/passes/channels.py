"""Where the channels of a value go: which columns of which layers read each of them.

A channel can be multiplied by a positive number, and the columns that read it divided by the
same, if all that lies between is linear in every channel by itself: moving entries about, products
with other values, relu, the sum over tokens that attention takes of its values. The walk carries
the numbers of the channels through the operators that move entries, on the sizes of the sample
that the graph was captured with; so heads, groups of heads and merged layers need no code of
their own.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam

LAYERS = (aten.linear.default, lam.grouped_linear.default)
"""Layers that read their input column by column."""

_ATTENTION = aten.scaled_dot_product_attention.default
_MOVES = frozenset(
    {
        *(aten.reshape.default, aten.clone.default, aten.expand.default, aten.transpose.int),
        *(aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *(aten.slice.Tensor, aten.select.int, aten.split_with_sizes.default, aten.repeat.default),
        *(aten.repeat_interleave.self_int, aten.flip.default),
    }
)
_CHOICES = frozenset({aten.index.Tensor, aten.index_select.default})
_SAME = frozenset(
    {
        *(aten.relu.default, aten.leaky_relu.default, aten.neg.default, aten.abs.default),
        aten.to.dtype,
    }
)
"""``f(c x) = c f(x)`` for ``c > 0``, entry by entry."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels.

    Attributes:
        layer: A linear layer, or linear layers of experts.
        value: Its input.
        channels: Which channel each column reads, int64 ``[in]``.
    """

    layer: Node
    value: Node
    channels: Tensor


@dataclass(frozen=True)
class Channels:
    """What reads the channels of a value.

    Attributes:
        readers: The layers, in topological order.
        fixed: Channels that something else reads too, or that a layer can't undo a factor of,
            bool ``[channels]``.
        reasons: What is in the way, in topological order; empty when nothing is fixed.
    """

    readers: tuple[Reader, ...]
    fixed: Tensor
    reasons: tuple[str, ...]

    @property
    def free(self) -> Tensor:
        """Channels that can take a factor: some layer reads them, and nothing is in the way."""
        read = torch.zeros_like(self.fixed)
        for reader in self.readers:
            read[reader.channels] = True
        return read & ~self.fixed


def follow(graph: Graph, node: Node) -> Channels:
    """Where the channels (the last axis) of `node` go.

    Args:
        graph: A canonical graph.
        node: A value whose last axis has a fixed size.
    """
    return _Walk(graph, node).channels()


def moves_rows(graph: Graph, user: Node, value: Node) -> bool:
    """Whether `user` only moves rows of `value` about, each as a whole, or casts them."""
    if user.target is aten.to.dtype:
        return bool(user.meta["val"].is_floating_point())
    if user.target not in _MOVES and user.target not in _CHOICES:
        return False
    walk = _Walk(graph, value)
    row = _row(walk.moved(user, value))
    return row is not None and torch.equal(row, torch.arange(_sizes(value)[-1]))


class _Walk:
    """One walk from a value to the layers that read it."""

    def __init__(self, graph: Graph, start: Node) -> None:
        self.graph = graph
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        shape = _sizes(start)
        self.numbers: dict[Node, Any] = {start: torch.arange(shape[-1]).expand(shape)}
        self.fixed = torch.zeros(shape[-1], dtype=torch.bool)
        self.reasons: list[str] = []
        self.readers: list[Reader] = []
        self.waiting: list[tuple[int, Node]] = []
        self.seen: set[Node] = set()
        self._push(start)

    def channels(self) -> Channels:
        while self.waiting:
            self._see(heapq.heappop(self.waiting)[1])
        self._check_weights()
        return Channels(tuple(self.readers), self.fixed, tuple(dict.fromkeys(self.reasons)))

    def _push(self, node: Node) -> None:
        for user in node.users:
            if user not in self.seen:
                self.seen.add(user)
                heapq.heappush(self.waiting, (self.order[user], user))

    def _see(self, user: Node) -> None:
        operands = [one for one in user.all_input_nodes if one in self.numbers]
        if user.op != "output" and not isinstance(user.meta.get("val"), Tensor | tuple | list):
            return  # An integer made of a shape: no entry is read.
        if user.target is _ATTENTION:
            operands = self._without_scores(user, operands)
            if not operands:
                return
        value, *others = operands
        if not others and user.target in LAYERS and _only(user, value, "input"):
            self._read(user, value)
            return
        moved = None if others else self.moved(user, value)
        if moved is None:
            name = "an output" if user.op == "output" else ops.op_name(user.target)
            for one in operands:
                self._fix(self.numbers[one], f"read by {name}")
            return
        self.numbers[user] = moved
        self._push(user)

    def _without_scores(self, user: Node, operands: list[Node]) -> list[Node]:
        """The values of an attention; queries, keys and masks can't take a factor."""
        values = [one for one in operands if _only(user, one, "value")]
        for one in operands:
            if one not in values:
                self._fix(self.numbers[one], f"read by {ops.op_name(user.target)}")
        return values

    def _fix(self, numbers: Any, reason: str) -> None:
        for part in numbers if isinstance(numbers, list | tuple) else [numbers]:
            self.fixed[part.reshape(-1)] = True
        self.reasons.append(reason)

    def _read(self, layer: Node, value: Node) -> None:
        numbers = _row(self.numbers[value])
        if numbers is None:
            self._fix(self.numbers[value], f"{layer.name} reads different channels in each row")
        else:
            self.readers.append(Reader(layer, value, numbers))

    def _check_weights(self) -> None:
        """A weight can take factors only if all its readers are among those found, and agree."""
        found = {reader.layer: reader for reader in self.readers}
        for reader in self.readers:
            weight = self.graph.operand(reader.layer, "weight")
            reason = ""
            if weight.op != "get_attr":
                reason = f"the weight of {reader.layer.name} is computed"
            elif not self.graph.is_loaded(weight):
                reason = f"weight {weight.target} is not in memory"
            else:
                odd = [user for user in weight.users if not _agrees(found.get(user), reader)]
                if odd:
                    reason = f"weight {weight.target} is shared with {odd[0].name}"
            if reason:
                self._fix(reader.channels, reason)

    def moved(self, user: Node, value: Node) -> Any:
        """The numbers of the channels in the result of `user`, or None if it mixes them."""
        rule = _RULES.get(user.target)
        if rule is not None:
            return rule(user, value, self.numbers[value])
        if user.target in _MOVES or _picks(user):
            return self._run(user)
        return self.numbers[value] if user.target in _SAME else None

    def _run(self, user: Node) -> Any:
        """The operator itself, on numbers; sizes are those of the sample."""
        args = map_arg(user.args, self._known)
        kwargs = map_arg(user.kwargs, self._known)
        target: Any = user.target
        try:
            return target(*args, **kwargs)
        except (RuntimeError, TypeError):
            return None  # Sizes that depend on data, or another tensor among the operands.

    def _known(self, node: Node) -> Any:
        return self.numbers[node] if node in self.numbers else _size(node.meta.get("val"))


def _agrees(one: Reader | None, other: Reader) -> bool:
    return one is not None and torch.equal(one.channels, other.channels)


def _only(user: Node, value: Node, name: str) -> bool:
    """Whether `user` reads `value` as the argument `name` and as nothing else."""
    return [key for key, operand in ops.bind(user).items() if operand is value] == [name]


def _picks(user: Node) -> bool:
    """Whether `user` takes one of several results."""
    return isinstance(user.meta.get("val"), Tensor) and ops.op_name(user.target).endswith("getitem")


def _size(value: Any) -> Any:
    """An integer of a graph as it was when the sample was traced; 1 where data decides."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint) if value.node.has_hint() else 1
    return value


def _sizes(node: Node) -> tuple[int, ...]:
    return tuple(_size(size) for size in node.meta["val"].shape)


def _row(numbers: Any) -> Tensor | None:
    """The numbers along the last axis if all rows are alike."""
    if not isinstance(numbers, Tensor):
        return None
    rows = numbers.reshape(-1, numbers.shape[-1])
    return rows[0].clone() if rows.shape[0] and bool((rows == rows[:1]).all()) else None


def _factor(user: Node, value: Node, numbers: Tensor) -> Tensor | None:
    """A product is linear in each factor, a quotient in what is divided."""
    if user.target is aten.div.Tensor and not _only(user, value, "self"):
        return None
    if len([one for one in user.args[:2] if one is value]) != 1:
        return None
    return numbers.expand(_sizes(user))


def _summed_tokens(user: Node, value: Node, numbers: Tensor) -> Tensor | None:
    """Attention adds up rows of its values: ``softmax(q k^T) v``."""
    attention = user.target is _ATTENTION
    if not _only(user, value, "value" if attention else "other") or numbers.ndim < 2:
        return None
    first = numbers[..., :1, :]
    if not bool((numbers == first).all()):
        return None
    shape = _sizes(user)
    if attention and ops.bind(user)["enable_gqa"]:
        first = first.repeat_interleave(shape[-3] // first.shape[-3], -3)
    return first.expand(shape)


def _reduced(user: Node, value: Node, numbers: Tensor) -> Tensor | None:
    """Sums and means over axes along which the channel stays."""
    bound = ops.bind(user)
    dims = bound["dim"]
    if not dims:
        return None
    least, most = numbers.amin(dims, bound["keepdim"]), numbers.amax(dims, bound["keepdim"])
    return least if torch.equal(least, most) else None


def _chosen_rows(user: Node, value: Node, numbers: Tensor) -> Tensor | None:
    """Rows chosen by data keep their last axis."""
    bound, last = ops.bind(user), numbers.ndim - 1
    row = _row(numbers)
    chosen_by: Any = bound.get("indices", bound.get("index"))
    if row is None or chosen_by is value or bound["self"] is not value:
        return None
    if user.target is aten.index.Tensor and len(chosen_by) > last:
        return None
    if user.target is aten.index_select.default and bound["dim"] % numbers.ndim == last:
        return None
    return row.expand(_sizes(user))


def _filled(user: Node, value: Node, numbers: Tensor) -> Tensor | None:
    """Zero stays zero whatever the factor."""
    zero = ops.bind(user)["value"] == 0 and _only(user, value, "self")
    return numbers.expand(_sizes(user)) if zero else None


_RULES: Mapping[Any, Callable[[Node, Node, Any], Tensor | None]] = {
    aten.mul.Tensor: _factor,
    aten.div.Tensor: _factor,
    _ATTENTION: _summed_tokens,
    aten.matmul.default: _summed_tokens,
    aten.mean.dim: _reduced,
    aten.sum.dim_IntList: _reduced,
    aten.index.Tensor: _chosen_rows,
    aten.index_select.default: _chosen_rows,
    aten.masked_fill.Scalar: _filled,
}

__all__ = ["LAYERS", "Channels", "Reader", "follow", "moves_rows"]
