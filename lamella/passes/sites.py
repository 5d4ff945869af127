"""Where a graph has weights that can be stored in few bits, and which of them go together.

A *site* is a weight matrix that only linear layers and embeddings read. Sites are found by what
operators do with a weight, never by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam

Role = Literal["linear", "head", "router", "embedding"]

FOLDED = "folded_by"
"""Key in the meta of a weight whose value is no longer that of the checkpoint."""

_READERS = frozenset({aten.linear.default, aten.embedding.default})


@dataclass(frozen=True)
class Site:
    """A weight that can be stored in few bits.

    Attributes:
        weight: Name of the weight.
        node: The node that reads it.
        readers: The linear layers and embeddings that use it, in topological order.
        role: ``"router"`` when a choice of experts hangs on it, ``"head"`` for the last linear
            layer before an output, ``"embedding"`` when only embeddings read it.
        shape: ``(out, in)``.
        dtype: As it is now.
    """

    weight: str
    node: Node
    readers: tuple[Node, ...]
    role: Role
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def linears(self) -> tuple[Node, ...]:
        """The linear layers among the readers."""
        return tuple(node for node in self.readers if node.target is aten.linear.default)

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self.shape[0] * self.shape[1]


def find_sites(graph: Graph) -> tuple[Site, ...]:
    """The sites of `graph`, in the order in which their weights are first used."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    sites = [site for node in graph.weight_nodes() if (site := _site(node)) is not None]
    return tuple(sorted(sites, key=lambda site: order[site.readers[0]]))


def other_weights(graph: Graph) -> dict[str, str]:
    """Weights of contractions and embeddings that are no site -> why."""
    reasons: dict[str, str] = {}
    for node in graph.weight_nodes():
        contracting = [user for user in node.users if _is_weight_of_contraction(node, user)]
        if contracting and _site(node) is None:
            reasons[str(node.target)] = _reason(node)
    return reasons


def tie_groups(sites: Iterable[Site]) -> tuple[tuple[Site, ...], ...]:
    """Sites that have to share a format, each site in exactly one group.

    Linear layers that read the same value and meet again before the next contraction are one
    group: queries, keys and values; gate and up. Backends merge them into one matrix product.
    An embedding and a head with one weight are one site already.
    """
    groups: list[tuple[list[Site], set[Node], set[Node]]] = []
    for site in sites:
        inputs, meets = _inputs(site), _meets(site)
        for members, their_inputs, their_meets in groups:
            if inputs & their_inputs and meets & their_meets:
                members.append(site)
                their_meets |= meets
                break
        else:
            groups.append(([site], inputs, meets))
    return tuple(tuple(members) for members, _, _ in groups)


def _site(node: Node) -> Site | None:
    value = node.meta["val"]
    readers = tuple(node.users)
    if value.ndim != 2 or not value.is_floating_point() or not readers:
        return None
    if not all(_reads_as_matrix(node, reader) for reader in readers):
        return None
    shape = (int(value.shape[0]), int(value.shape[1]))
    return Site(str(node.target), node, readers, _role(readers), shape, value.dtype)


def _reads_as_matrix(node: Node, reader: Node) -> bool:
    """Whether `node` is the weight of `reader`, and nothing else of it."""
    if reader.target not in _READERS:
        return False
    uses = [name for name, value in ops.bind(reader).items() if value is node]
    return uses == ["weight"]


def _role(readers: tuple[Node, ...]) -> Role:
    linears = [reader for reader in readers if reader.target is aten.linear.default]
    if not linears:
        return "embedding"
    for linear in linears:
        passed, stops = _downstream(linear)
        if any(node.target is aten.topk.default for node in passed):
            return "router"
        if not stops and not any(_is_sum_of_activations(node) for node in passed):
            return "head"
    return "linear"


def _inputs(site: Site) -> set[Node]:
    """The activations that the linear layers of a site read; none for a router or a head."""
    if site.role != "linear":
        return set()
    return {r.args[0] for r in site.readers if isinstance(r.args[0], Node)}


def _meets(site: Site) -> set[Node]:
    return {stop for reader in site.readers for stop in _downstream(reader)[1]}


@functools.cache
def _contractions() -> frozenset[object]:
    return frozenset(
        target
        for target, facts in ops.CANONICAL.items()
        if facts.category in ("contraction", "attention", "scan")
    )


def _downstream(node: Node) -> tuple[set[Node], set[Node]]:
    """What `node` flows through up to the next contractions, and those contractions."""
    passed: set[Node] = set()
    stops: set[Node] = set()
    waiting = list(_tensor_users(node))
    while waiting:
        user = waiting.pop()
        if user in passed or user in stops:
            continue
        if user.target in _contractions():
            stops.add(user)
        else:
            passed.add(user)
            waiting.extend(_tensor_users(user))
    return passed, stops


def _tensor_users(node: Node) -> Iterator[Node]:
    return (user for user in node.users if not ops.is_shape_arithmetic(user.target) or _picks(user))


def _picks(node: Node) -> bool:
    """Whether shape arithmetic is really `getitem` of a tuple of tensors."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_sum_of_activations(node: Node) -> bool:
    if node.target is not aten.add.Tensor:
        return False
    operands = [a for a in node.args[:2] if isinstance(a, Node) and a.op != "get_attr"]
    shapes = {tuple(map(str, operand.meta["val"].shape)) for operand in operands}
    return len(operands) == 2 and len(shapes) == 1


def _is_weight_of_contraction(node: Node, user: Node) -> bool:
    wanted = (*_READERS, aten.conv1d.default, aten.conv2d.default, aten.conv_transpose2d.input)
    if user.target not in (*wanted, lam.grouped_linear.default):
        return False
    return ops.bind(user).get("weight") is node


def _reason(node: Node) -> str:
    value = node.meta["val"]
    targets = [reader.target for reader in node.users if not _reads_as_matrix(node, reader)]
    if value.ndim != 2 or not targets:
        return f"{value.ndim} axes in {ops.op_name(next(iter(node.users)).target)}"
    return f"also read by {', '.join(dict.fromkeys(map(ops.op_name, targets)))}"
