"""Where a factor for each channel can move from what makes a value into the layers that read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.passes.channels import LAYERS, Channels, Reader, follow
from lamella.passes.sites import FOLDED

NORMS = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class Place:
    """A norm or a linear layer, and all that reads its channels.

    Attributes:
        producer: It is multiplied by ``1 / s``.
        readers: Their columns are multiplied by ``s``.
        free: Channels that can take a factor, bool ``[channels]``; the others keep 1.
    """

    producer: Node
    readers: tuple[Reader, ...]
    free: Tensor

    @property
    def is_norm(self) -> bool:
        """Whether the producer is a norm rather than a linear layer."""
        return self.producer.target in NORMS

    def spread(self, of_columns: list[Tensor], reduce: str) -> Tensor:
        """Statistics of the columns of each reader as one of the channels, float64.

        Args:
            of_columns: ``[in]`` for each reader.
            reduce: ``"amax"`` or ``"mean"`` where several columns read one channel.
        """
        result = torch.zeros(len(self.free), dtype=torch.float64)
        numbers = torch.cat([reader.channels for reader in self.readers])
        values = torch.cat(of_columns).double()
        return result.scatter_reduce(0, numbers, values, reduce, include_self=False)


def find_places(graph: Graph) -> tuple[tuple[Place, ...], dict[str, list[str]]]:
    """All places, and why there are no others: reason -> names of the producers.

    A layer takes factors from one place only, the first in topological order (a gate that is a
    `relu` and the value beside it both reach the same layer).
    """
    places: list[Place] = []
    refused: dict[str, list[str]] = {}
    taken: set[Node] = set()
    for producer in graph.find(*NORMS, *LAYERS):
        reason = _unable(graph, producer)
        channels = None if reason else follow(graph, producer)
        if channels is not None:
            reason = _nothing_free(channels, taken)
        if channels is None or reason:
            refused.setdefault(reason, []).append(producer.name)
            continue
        # Readers of which every column belongs to a fixed channel take no part.
        readers = tuple(r for r in channels.readers if bool(channels.free[r.channels].any()))
        places.append(Place(producer, readers, channels.free))
        taken |= {reader.layer for reader in readers}
    return tuple(places), refused


def _unable(graph: Graph, producer: Node) -> str:
    """Why a producer can't be divided by factors, or nothing."""
    if producer.target in NORMS and len(graph.operand(producer, "normalized_shape")) != 1:
        return "normalizes several axes"
    for operand in _parameters(graph, producer):
        if operand.op != "get_attr":
            return f"{operand.name} is computed"
        if not graph.is_loaded(operand):
            return f"weight {operand.target} is not in memory"
        others = [user for user in operand.users if user is not producer]
        if others:
            return f"weight {operand.target} is shared with {others[0].name}"
    return ""


def _parameters(graph: Graph, producer: Node) -> list[Node]:
    """Scale and bias of a norm, weight and bias of a layer; what is None is left out."""
    with_bias = producer.target in (aten.layer_norm.default, aten.linear.default)
    names = ("weight", "bias") if with_bias else ("weight",)
    found = [graph.operand(producer, name) for name in names]
    return [operand for operand in found if operand is not None]


def _nothing_free(channels: Channels, taken: set[Node]) -> str:
    if any(reader.layer in taken for reader in channels.readers):
        return "its readers have factors already"
    if bool(channels.free.any()):
        return ""
    return channels.reasons[0] if channels.reasons else "nothing reads it"


def move_scales(graph: Graph, place: Place, scales: Tensor, author: str) -> None:
    """Divide the producer by `scales` and multiply the columns of the readers by them.

    Products are taken in float64 and stored in the dtype of the weight.

    Args:
        graph: The graph to edit.
        place: Where.
        scales: Positive, ``[channels]``, 1 where the place is not free.
        author: Name of the pass, left on every weight that changes.
    """
    producer, inverse = place.producer, 1.0 / scales.double()
    if place.is_norm and graph.operand(producer, "weight") is None:
        width = producer.meta["val"].dtype
        added = graph.add_weight(f"{producer.name}.scale", torch.ones(len(scales), dtype=width))
        graph.set_operand(producer, "weight", added)
    for operand in _parameters(graph, producer):
        value = graph.weight(operand)
        rows = inverse if value.ndim == 1 else inverse[:, None]
        _store(graph, operand, value.double() * rows, author)
    columns = {graph.operand(r.layer, "weight"): r.channels for r in place.readers}
    for weight, numbers in columns.items():
        value = graph.weight(weight)
        _store(graph, weight, value.double() * scales.double()[numbers], author)


def _store(graph: Graph, node: Node, value: Tensor, author: str) -> None:
    graph.set_weight(node, value.to(graph.weight(node).dtype))
    node.meta[FOLDED] = author


__all__ = ["NORMS", "Place", "find_places", "move_scales"]
