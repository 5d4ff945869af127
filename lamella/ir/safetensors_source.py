"""Weights that stay in safetensors files and are read, whole or by rows, when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lamella.errors import ModelFileError, closest
from lamella.ir.safetensors_file import read_header
from lamella.ir.weights import WeightSource


@dataclass(frozen=True)
class Place:
    """Where a weight lies.

    Attributes:
        path: The file.
        key: Its name there.
        dtype: What the graph holds; the file may hold another type of floating point.
        shape: As in the file.
    """

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Composed:
    """A weight that is made of tensors of the files (experts that lie there one by one).

    Attributes:
        parts: The places of the tensors.
        compose: Makes the weight of the tensors, given in that order.
    """

    parts: tuple[Place, ...]
    compose: Callable[[list[Tensor]], Tensor]


class SafetensorsSource(WeightSource):
    """Reads weights from memory-mapped files; nothing is kept but the mapping."""

    def __init__(self, places: Mapping[str, Place | Composed]) -> None:
        """Read the weights at `places`, by the names that the graph uses."""
        self._places = dict(places)
        self._open: dict[Path, Any] = {}

    @classmethod
    def of_files(cls, *paths: Path) -> SafetensorsSource:
        """All tensors of some files under the names that they have there.

        Raises:
            ModelFileError: A file is missing or corrupt.
        """
        return cls(
            {
                name: Place(path, name, entry.dtype, entry.shape)
                for path in paths
                for name, entry in read_header(path).items()
            }
        )

    def names(self) -> frozenset[str]:
        """The names that the graph uses."""
        return frozenset(self._places)

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`.

        Raises:
            ModelFileError: It is not in the files, or a file changed.
        """
        place = self._place(name)
        if isinstance(place, Composed):
            return place.compose([self._read(part, _whole) for part in place.parts])
        return self._read(place, _whole)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of `name` along its first axis.

        Other rows are not read, but for a weight that is composed of several tensors.

        Raises:
            ModelFileError: As `read`.
        """
        place = self._place(name)
        if isinstance(place, Composed):
            return self.read(name)[start:stop]
        return self._read(place, lambda file, key: file.get_slice(key)[start:stop])

    def _place(self, name: str) -> Place | Composed:
        if name not in self._places:
            raise ModelFileError(
                f"the model files hold no weight {name!r}{closest(name, self._places)}"
            )
        return self._places[name]

    def _read(self, place: Place, read: Callable[[Any, str], Tensor]) -> Tensor:
        try:
            if place.path not in self._open:
                self._open[place.path] = safe_open(place.path, framework="pt")
            value = read(self._open[place.path], place.key)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"{str(place.path)!r} no longer holds {place.key!r} as it did when the model was "
                f"captured ({error})"
            ) from error
        return value.to(place.dtype)


def _whole(file: Any, key: str) -> Tensor:
    return file.get_tensor(key)
