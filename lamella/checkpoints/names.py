"""From the weights of a model in memory to the tensors of its files, by the rules of transformers.

The files of many architectures call weights otherwise than the model that transformers builds, or
hold one by one what is one weight in memory (experts). Reading is `lamella.ir.checkpoint_names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lamella.checkpoints.weights import Weight


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Attributes:
        name: Its name there.
        shape: Its shape.
        dtype: Its type.
        make: Makes it, when it is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stored(model: PreTrainedModel, weights: Iterable[Weight]) -> Iterator[Stored]:
    """The tensors of the files in which `weights` of `model` are stored."""
    for weight in weights:
        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        made = revert_weight_conversion(model, {weight.name: empty})
        parts = _Parts(model, weight)
        for name, part in made.items():
            yield Stored(name, tuple(part.shape), part.dtype, lambda n=name, p=parts: p.take(n))


class _Parts:
    """The tensors that one weight is stored as; it is made once for all of them."""

    def __init__(self, model: PreTrainedModel, weight: Weight) -> None:
        self._model, self._weight = model, weight
        self._made: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """One of the tensors, which is forgotten afterwards."""
        if name not in self._made:
            value = {self._weight.name: self._weight.read()}
            self._made = dict(revert_weight_conversion(self._model, value))
        return self._made.pop(name)
