"""State-space layers that continue: causal convolutions and recurrences with a state."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from lamella.errors import IncrementalError
from lamella.ir import ops
from lamella.ir.symbols import shape_of, size_of
from lamella.rewrite.incremental.build import Builder
from lamella.rewrite.incremental.roles import Role

aten = torch.ops.aten
lam = torch.ops.lamella
_END = 2**63 - 1

_CACHED: Mapping[Any, Any] = MappingProxyType(
    {
        lam.selective_scan.default: lam.cached_selective_scan.default,
        lam.head_scan.default: lam.cached_head_scan.default,
    }
)
"""Recurrence from zeros -> the same from a state."""


@dataclass(frozen=True)
class Convolution:
    """A convolution along the tokens whose output is cut to the length of its input.

    Attributes:
        node: The convolution, padded by ``kernel - 1`` on both sides.
        cuts: The slices that keep the first outputs.
        kept: Inputs that the next call needs: ``kernel - 1``.
    """

    node: Node
    cuts: tuple[Node, ...]
    kept: int


def convolutions_of(builder: Builder) -> list[Convolution]:
    """The causal convolutions on new tokens, in order.

    Raises:
        IncrementalError: A convolution along the tokens is not causal.
    """
    found: list[Convolution] = []
    for node in builder.graph.find(aten.conv1d.default):
        sizes = shape_of(node.args[0])  # pyright: ignore[reportArgumentType]  (a node)
        if builder.roles.get(node) is Role.NEW and sizes[-1] == builder.length:
            found.append(_convolution(builder, node))
    return found


def _convolution(builder: Builder, node: Node) -> Convolution:
    bound = ops.bind(node)
    kernel = int(bound["weight"].meta["val"].shape[-1])
    cuts = tuple(user for user in node.users if _keeps_first(builder, user))
    plain = bound["stride"] == [1] and bound["dilation"] == [1]
    if not plain or bound["padding"] != [kernel - 1] or len(cuts) != len(node.users):
        raise IncrementalError(
            f"{node.name} convolves along the tokens with a kernel of {kernel} and is not cut to "
            f"a causal convolution, so it can't continue from a cache"
        )
    return Convolution(node, cuts, kernel - 1)


def _keeps_first(builder: Builder, node: Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    bound = ops.bind(node)
    end = bound["end"]
    ends = isinstance(end, Node) and size_of(end.meta["val"]) == builder.length
    return bound["dim"] % 3 == 2 and bound["start"] in (0, None) and ends and bound["step"] == 1


def scans_of(builder: Builder) -> list[Node]:
    """The recurrences on new tokens."""
    scans = [node for target in _CACHED for node in builder.graph.find(target)]
    return [node for node in scans if builder.roles.get(node) is Role.NEW]


def state_shape(scan: Node) -> list[Any]:
    """The sizes of the state of a recurrence, with the batch."""
    bound = ops.bind(scan)
    batch, *inner = bound["input"].meta["val"].shape
    if scan.target is lam.head_scan.default:
        return [batch, *inner[1:], int(bound["b"].meta["val"].shape[3])]
    return [batch, inner[0], int(bound["a"].meta["val"].shape[1])]


def continue_convolution(builder: Builder, found: Convolution, past: Node) -> None:
    """Let a convolution read the last inputs of the past before the new ones."""
    graph, bound = builder.graph, ops.bind(found.node)
    joined = graph.call(aten.cat.default, [past, bound["input"]], 2, before=found.node)
    result = graph.call(
        aten.conv1d.default,
        joined,
        bound["weight"],
        bound["bias"],
        groups=bound["groups"],
        before=found.node,
    )
    for cut in found.cuts:
        graph.replace(cut, result)
    kept = graph.call(aten.slice.Tensor, joined, 2, -found.kept, _END, after=joined)
    builder.set_output(past, kept)


def continue_scan(builder: Builder, node: Node, past: Node) -> None:
    """Let a recurrence start from the state after the past."""
    graph, bound = builder.graph, ops.bind(node)
    names = ("input", "delta", "a", "b", "c")
    both = graph.call(_CACHED[node.target], *(bound[n] for n in names), past, before=node)
    graph.replace(node, graph.call(operator.getitem, both, 0, before=node))
    builder.set_output(past, graph.call(operator.getitem, both, 1, after=both))
