"""The weights of a second checkpoint of the same architecture, one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.fx import Node

from lamella.errors import PassError
from lamella.ir.graph import Graph
from lamella.ir.huggingface import is_pretrained
from lamella.ir.safetensors_source import SafetensorsSource
from lamella.ir.sources import read_model
from lamella.ir.weights import WeightSource
from lamella.rewrite.canonicalize import canonicalize

Other = str | Path | nn.Module | Graph
"""A second checkpoint: a model folder or file, a module, or a graph."""

_FROM_CODE = "constant_folded"
_LISTED = 20


class Checkpoint(Protocol):
    """Weights by the names and in the layout of a graph."""

    def names(self) -> frozenset[str]:
        """What can be read."""
        ...

    def read(self, name: str) -> Tensor:
        """One weight; nothing is kept."""
        ...


@dataclass(frozen=True)
class _OfGraph:
    """The weights of another graph, canonical like the first."""

    graph: Graph

    def names(self) -> frozenset[str]:
        return frozenset(str(node.target) for node in self.graph.weight_nodes())

    def read(self, name: str) -> Tensor:
        return self.graph.weight(name)


@dataclass(frozen=True)
class _ByName:
    """Weights as a checkpoint stores them; those the graph holds transposed are turned."""

    stored: WeightSource | Mapping[str, Tensor]
    transposed: frozenset[str]

    def names(self) -> frozenset[str]:
        stored = self.stored
        return stored.names() if isinstance(stored, WeightSource) else frozenset(stored)

    def read(self, name: str) -> Tensor:
        stored = self.stored
        value = stored.read(name) if isinstance(stored, WeightSource) else stored[name]
        return value.mT if name in self.transposed else value


def open_checkpoint(other: Other, graph: Graph) -> Checkpoint:
    """The weights of `other` for the weights of `graph`.

    Names are looked up as they are stored. Where the graph holds weights that no checkpoint
    stores (a constant that was computed from parameters), `other` is captured as `graph` was.

    Raises:
        PassError: Names are missing, or shapes differ: another architecture. All are listed.
        CaptureError: `other` is no model.
    """
    wanted = stored_weights(graph)
    found = _by_name(other, graph, frozenset(str(node.target) for node in wanted))
    _check(found, wanted, bool(graph.origin.dropped))
    return found


def stored_weights(graph: Graph) -> list[Node]:
    """The nodes that read floating weights a checkpoint has: no buffers that follow from code."""
    return [
        node
        for node in graph.weight_nodes()
        if node.meta["val"].is_floating_point()
        and str(node.target) not in graph.origin.constants
        and not str(node.target).startswith(_FROM_CODE)
    ]


def _by_name(other: Other, graph: Graph, wanted: frozenset[str]) -> Checkpoint:
    if isinstance(other, Graph):
        return _OfGraph(other)
    stored: WeightSource | Mapping[str, Tensor] | None = None
    if isinstance(other, nn.Module):
        stored = other.state_dict(keep_vars=False)
    elif files := _safetensors(Path(other)):
        stored = SafetensorsSource.of_files(*files)
    if stored is not None:
        found = _ByName(stored, graph.origin.transposed)
        if wanted <= found.names() or not _can_be_captured(other):
            return found
    captured = read_model(other).graph
    canonicalize(captured)
    return _OfGraph(captured)


def _can_be_captured(other: str | Path | nn.Module) -> bool:
    """Whether a graph of `other` can be made without sample inputs."""
    if isinstance(other, nn.Module):
        return is_pretrained(other)
    return (Path(other) / "config.json").is_file()


def _safetensors(path: Path) -> list[Path]:
    return [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))


def _check(found: Checkpoint, wanted: Iterable[Node], dropped: bool) -> None:
    """Refuse another architecture, with every difference."""
    names = found.names()
    differences: list[str] = []
    for node in wanted:
        name, shape = str(node.target), tuple(node.meta["val"].shape)
        if name not in names:
            differences.append(f"{name} is missing")
        elif (theirs := tuple(found.read(name).shape)) != shape:
            differences.append(f"{name} is {list(theirs)} instead of {list(shape)}")
    if not dropped:
        ours = {str(node.target) for node in wanted}
        patterns = {_pattern(name) for name in ours}
        further = sorted(n for n in names - ours if "#" in _pattern(n) and _pattern(n) in patterns)
        differences += [f"{name} has no counterpart" for name in further]
    if differences:
        more = len(differences) - _LISTED
        tail = f", and {more} more" if more > 0 else ""
        raise PassError(
            f"the other checkpoint is of another architecture: "
            f"{', '.join(differences[:_LISTED])}{tail}"
        )


def _pattern(name: str) -> str:
    """`name` with ``#`` for numbers: weights of a layer that the graph doesn't have match."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
