"""Heads, experts and channels: values that can be cut along an axis, and what the slices are.

Parts are found by what operators do with a value, never by its name. The heads of an attention
are an axis of its result. The channels of a hidden layer are an axis of what the last layer of a
branch reads, if a layer of the same branch computes it; in a chain of convolutions those between
them count as well. Experts are runs of rows, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.kinds import ATTENTION, CONV, CROSS_ATTENTION, LAYERS, SSM
from lamella.ir.ops import aten, lam
from lamella.ir.reach import base_name
from lamella.ir.stream import Sublayer

PartKind = Literal["head", "head-group", "expert", "channel"]


@dataclass(frozen=True)
class Experts:
    """How the rows of a value belong to experts.

    Attributes:
        offsets: Computes where the rows of each expert end, ``[experts]``.
        tokens: Computes which token each row is, ``[rows]``; None if that is not known.
        count: How many there are.
    """

    offsets: Node
    tokens: Node | None
    count: int


@dataclass(frozen=True)
class Parts:
    """The parts of one kind in one value.

    Attributes:
        kind: ``"head"``, ``"head-group"`` (heads that share keys and values), ``"expert"``, or
            ``"channel"``.
        name: Of the branch, or of the node where it is in none or one of several there.
        node: The value.
        axis: The axis that heads or channels lie along, counted from the end; -1 for experts.
        count: How many parts there are; channels of experts: of each expert.
        branch: The branch that the value is in, or None.
        experts: Of whose rows the value consists; None where rows are tokens.
    """

    kind: PartKind
    name: str
    node: Node
    axis: int
    count: int
    branch: Sublayer | None = None
    experts: Experts | None = None


def find_parts(graph: Graph) -> tuple[Parts, ...]:
    """All parts of `graph`, in the order of the values that they are in."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    owner = {node: part for part in graph.stream.sublayers for node in part.nodes}
    found = [one for node in graph.nodes if attends(node) for one in _heads(node, owner.get(node))]
    for branch in graph.stream.sublayers:
        found += _of_layers(branch, order)
    found = sorted(found, key=lambda one: order[one.node])
    return tuple(_named(found))


def attends(node: Node) -> bool:
    """Whether a node computes ``[batch, heads, sequence, width]`` by attention."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        return False
    if node.target is aten.scaled_dot_product_attention.default:
        return True
    if node.target is not aten.matmul.default:
        return False
    weights = node.args[0]
    while isinstance(weights, Node) and weights.target is aten.to.dtype:
        weights = weights.args[0]
    return isinstance(weights, Node) and weights.target is aten.softmax.int


def _heads(node: Node, branch: Sublayer | None) -> Iterator[Parts]:
    heads = node.meta["val"].shape[-3]
    if not isinstance(heads, int):
        return
    name = node.name if branch is None else branch.name
    yield Parts("head", name, node, -3, heads, branch)
    groups = heads
    if node.target is aten.scaled_dot_product_attention.default:
        groups = ops.bind(node)["key"].meta["val"].shape[-3]
    if isinstance(groups, int) and heads % groups == 0:
        yield Parts("head-group", name, node, -3, groups, branch)


# ---- layers -----------------------------------------------------------------------------


def _of_layers(branch: Sublayer, order: dict[Node, int]) -> Iterator[Parts]:
    """Experts and hidden channels of a branch."""
    if branch.kind in (ATTENTION, CROSS_ATTENTION):
        return
    seen: set[Node] = set()
    waiting = _layers_behind([branch.branch], branch)
    while waiting:
        layer = waiting.pop()
        if layer in seen:
            continue
        seen.add(layer)
        value = _read(layer)
        before = _layers_behind([value], branch)
        experts = _experts(layer, branch)
        if experts is not None:
            result = _weighted(layer)
            yield Parts("expert", branch.name, result, -1, experts.count, branch, experts)
        if not before and not _is_scanned(value, branch):
            continue
        axis = -(layer.meta["val"].ndim - 1) if _convolves(layer) else -1
        width = value.meta["val"].shape[axis]
        if isinstance(width, int):
            yield Parts("channel", branch.name, value, axis, width, branch, experts)
        if branch.kind == CONV and _convolves(layer):
            waiting += [one for one in before if _convolves(one)]


def _layers_behind(values: Iterable[Node], branch: Sublayer) -> list[Node]:
    """The nearest layers with weights that values of a branch are computed by."""
    found: list[Node] = []
    seen: set[Node] = set()
    waiting = list(values)
    while waiting:
        node = waiting.pop()
        if node in seen or node not in branch.nodes:
            continue
        seen.add(node)
        if base_name(node) in LAYERS:
            found.append(node)
        elif not _is_choice(node):
            waiting += node.all_input_nodes
    return found


def _is_choice(node: Node) -> bool:
    """Whether a node only says which values are meant; relevance goes past it."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor | tuple | list) or (
        isinstance(value, Tensor) and not value.is_floating_point()
    )


def _is_scanned(value: Node, branch: Sublayer) -> bool:
    """Whether a scan computes a value, whose layers lie before it."""
    return branch.kind == SSM and value in branch.nodes


def _convolves(node: Node) -> bool:
    return node.target in (aten.conv1d.default, aten.conv2d.default)


def _read(layer: Node) -> Node:
    bound: dict[str, Any] = ops.bind(layer)
    return bound["input"] if "input" in bound else layer.all_input_nodes[0]


def _experts(layer: Node, branch: Sublayer) -> Experts | None:
    if layer.target is not lam.grouped_linear.default:
        return None
    bound = ops.bind(layer)
    count = int(bound["weight"].meta["val"].shape[0])
    first = layer
    while before := [
        one
        for one in _layers_behind([_read(first)], branch)
        if one.target is lam.grouped_linear.default
    ]:
        first = before[0]
    rows = _read(first)
    chosen: Any = ops.bind(rows).get("indices") if rows.target is aten.index.Tensor else None
    is_one = isinstance(chosen, list | tuple) and len(chosen) == 1 and isinstance(chosen[0], Node)
    return Experts(bound["offsets"], chosen[0] if is_one else None, count)


def _weighted(layer: Node) -> Node:
    """The result of experts times the weights of the router, where that follows."""
    users = list(layer.users)
    if len(users) != 1 or users[0].target is not aten.mul.Tensor:
        return layer
    before, after = (node.meta["val"].shape for node in (layer, users[0]))
    return users[0] if len(before) == len(after) and before[-1] == after[-1] else layer


def _named(found: list[Parts]) -> Iterator[Parts]:
    """Parts whose names say which they are, even where a branch has several values of a kind."""
    counts: dict[tuple[str, str], int] = {}
    for one in found:
        counts[one.kind, one.name] = counts.get((one.kind, one.name), 0) + 1
    for one in found:
        twice = counts[one.kind, one.name] > 1
        name = f"{one.name}.{one.node.name}" if twice else one.name
        yield Parts(one.kind, name, one.node, one.axis, one.count, one.branch, one.experts)
