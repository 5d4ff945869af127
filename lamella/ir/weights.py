"""Weights that are read when they are asked for.

A graph captured without data (on the meta device) holds the shapes of its weights and a
`WeightSource` that reads them one by one, or slice by slice, from memory-mapped files.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace

from torch import Tensor

from lamella.errors import GraphError


class WeightSource(abc.ABC):
    """Where the data of weights lies that are not in memory."""

    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """The names that can be read."""

    @abc.abstractmethod
    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, freshly read; nothing is cached.

        Raises:
            ModelFileError: The file no longer holds what its header promised.
        """

    @abc.abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of `name` along its first axis, without reading the others."""


@dataclass(frozen=True)
class Origin:
    """Where a graph came from: what a checkpoint writer and a report need to know.

    Attributes:
        kind: ``"module"``, ``"transformers"``, ``"exported-program"``, ``"onnx"``.
        architecture: Class of the model, for people and for checkpoints.
        config: The Hugging Face config as a dictionary, or None.
        generation: The generation config of a model that generates, as a dictionary, or None.
        folder: The folder or file the model was read from, or None.
        transposed: Weights held as ``[out, in]`` that the checkpoint stores as ``[in, out]``.
        aliases: Other names of tied weights -> the name the graph uses.
        constants: Buffers that no checkpoint stores: they follow from the code and the config.
        dropped: Blocks and sublayers that passes took out, by name, in the order in which they
            went: what a checkpoint writer must leave out of the config.
    """

    kind: str = "module"
    architecture: str = ""
    config: dict[str, object] | None = None
    generation: dict[str, object] | None = None
    folder: str | None = None
    transposed: frozenset[str] = frozenset()
    aliases: tuple[tuple[str, str], ...] = ()
    constants: frozenset[str] = frozenset()
    dropped: tuple[str, ...] = ()

    def with_transposed(self, name: str) -> Origin:
        """The same origin, with `name` marked as stored the other way round."""
        return replace(self, transposed=self.transposed | {name})


def not_loaded(name: str) -> GraphError:
    """The error for a weight that has a shape but no data and no source."""
    return GraphError(
        f"weight {name!r} has no data: the model was captured on the meta device without a "
        f"folder of safetensors to read from"
    )
