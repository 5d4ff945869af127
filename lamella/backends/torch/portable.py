"""What every torch executable can be rebuilt from: the text of the graph and its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, fx

from lamella.backends.base import tensor_bytes
from lamella.backends.inputs import InputSpec, specs_from_json, specs_of
from lamella.backends.torch.graph_json import graph_to_json, module_from_json
from lamella.backends.torch.narrow import KEY, Narrow, bytes_of, find_narrow, from_text, to_text
from lamella.errors import ArtifactError
from lamella.ir.graph import Graph

GRAPH = "graph.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Portable:
    """A graph without PyTorch's objects: what is written into a folder.

    Attributes:
        nodes: The graph as data, see `graph_json`.
        inputs: What the graph takes.
        weights: Its weights by name, each in memory of its own.
    """

    nodes: Mapping[str, Any]
    inputs: tuple[InputSpec, ...]
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, graph: Graph) -> Portable:
        """The portable form of a canonical graph.

        Raises:
            BackendError: The graph holds operators that are not canonical.
        """
        return cls(graph_to_json(graph), specs_of(graph), _weights_of(graph))

    @classmethod
    def read(cls, folder: Path) -> Portable:
        """Read what `write` wrote.

        Raises:
            ArtifactError: A file is missing or corrupt.
        """
        try:
            data = json.loads((folder / GRAPH).read_text(encoding="utf-8"))
            weights = _read_weights(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtifactError(f"{str(folder)!r} can't be read ({error})") from error
        if not isinstance(data, dict) or not {"inputs", "graph"} <= set(data):
            raise ArtifactError(f"{str(folder / GRAPH)!r} is not the text of a graph")
        return cls(data["graph"], specs_from_json(data["inputs"]), weights)

    def write(self, folder: Path) -> None:
        """Write the text of the graph and the weights as safetensors."""
        (folder / GRAPH).write_text(self._text, encoding="utf-8")
        narrow = self._narrow
        stored = {n: narrow[n].stored(w) if n in narrow else w for n, w in self.weights.items()}
        metadata = {KEY: to_text(narrow)} if narrow else None
        safetensors.torch.save_file(stored, folder / WEIGHTS, metadata)

    def module(self) -> fx.GraphModule:
        """A new fx module that shares the weights.

        Raises:
            ArtifactError: The text is malformed.
        """
        return module_from_json(self.nodes, self.weights)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return tensor_bytes(list(self.weights.values()))

    @property
    def file_bytes(self) -> int:
        """Bytes that `write` writes, to within the header of the weights."""
        stored = bytes_of(self.weights, self._narrow)
        return stored + len(self._text.encode()) + 100 * len(self.weights)

    @cached_property
    def _narrow(self) -> Mapping[str, Narrow]:
        """The weights that a file holds in fewer bits than memory."""
        return find_narrow(self.nodes, self.weights)

    @cached_property
    def _text(self) -> str:
        inputs = [spec.to_json() for spec in self.inputs]
        return json.dumps({"inputs": inputs, "graph": self.nodes})


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a file, as the kernels read them."""
    weights = safetensors.torch.load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    for name, narrow in from_text(metadata.get(KEY, "{}")).items():
        if name not in weights:
            raise ValueError(f"it has no weight {name!r}")
        weights[name] = narrow.packed(weights[name])
    return weights


def _weights_of(graph: Graph) -> dict[str, Tensor]:
    """The weights by name, each contiguous and in memory of its own, as safetensors wants."""
    taken: set[int] = set()
    weights: dict[str, Tensor] = {}
    for node in graph.weight_nodes():
        value = graph.weight(node).detach()
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == tensor_bytes([value])
        if not whole or value.data_ptr() in taken:
            value = value.contiguous().clone()
        taken.add(value.data_ptr())
        weights[str(node.target)] = value
    return weights
