"""Weights that stay in safetensors files and are read, whole or by rows, when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lamella.errors import ModelFileError
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


class SafetensorsSource(WeightSource):
    """Reads weights from memory-mapped files; nothing is kept but the mapping.

    A weight that the files hold in another form (experts that a model fuses when it is loaded)
    has a reason in `unreadable` instead of a place: reading it is an error with that reason.
    """

    def __init__(self, places: Mapping[str, Place], unreadable: Mapping[str, str]) -> None:
        """Read the weights at `places`, by the names that the graph uses."""
        self._places = dict(places)
        self._unreadable = dict(unreadable)
        self._open: dict[Path, Any] = {}

    @classmethod
    def of_files(cls, *paths: Path) -> SafetensorsSource:
        """All tensors of some files under the names that they have there.

        Raises:
            ModelFileError: A file is missing or corrupt.
        """
        from lamella.ir.safetensors_file import read_header  # noqa: PLC0415

        places = {
            name: Place(path, name, entry.dtype, entry.shape)
            for path in paths
            for name, entry in read_header(path).items()
        }
        return cls(places, {})

    def names(self) -> frozenset[str]:
        """The names that the graph uses, those that can't be read included."""
        return frozenset(self._places) | frozenset(self._unreadable)

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`.

        Raises:
            ModelFileError: It is not in the files in this form, or the file changed.
        """
        place = self._place(name)
        return self._read(place, lambda file: file.get_tensor(place.key))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of `name` along its first axis; other rows are not read.

        Raises:
            ModelFileError: As `read`.
        """
        place = self._place(name)
        return self._read(place, lambda file: file.get_slice(place.key)[start:stop])

    def _place(self, name: str) -> Place:
        if name in self._unreadable:
            raise ModelFileError(
                f"weight {name!r} can't be read on its own: {self._unreadable[name]}"
            )
        if name not in self._places:
            raise ModelFileError(f"the model files hold no weight {name!r}")
        return self._places[name]

    def _read(self, place: Place, read: Callable[[Any], Tensor]) -> Tensor:
        try:
            if place.path not in self._open:
                self._open[place.path] = safe_open(place.path, framework="pt")
            value = read(self._open[place.path])
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"{str(place.path)!r} no longer holds {place.key!r} as it did when the model was "
                f"captured ({error})"
            ) from error
        return value.to(place.dtype)
