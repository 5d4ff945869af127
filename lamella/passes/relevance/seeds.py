"""Where relevance starts: the coefficient of the output.

A seed is a plain tensor function of the output ``[batch, …, classes]``; positions between batch
and classes count all unless one is chosen. Relevance is linear in the seed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lamella.errors import known_names
from lamella.ir.ops import aten
from lamella.rules.relevance.broadcast import full_like

Index = int | None
"""A class; None means the label of the row, or the largest class where there are no labels."""


class Placed(ABC):
    """A seed for one place of a sequence, or for all places."""

    position: int | None

    @abstractmethod
    def everywhere(self, output: Any, label: Any) -> Any:
        """The coefficient at all places."""

    def __call__(self, output: Any, label: Any = None) -> Any:
        """The coefficient of `output`; with zeros but at the place, if one is chosen."""
        found = self.everywhere(output, label)
        if self.position is None or found.ndim < 3:
            return found
        return _kept(found, 1, self.position)


@dataclass(frozen=True)
class Logit(Placed):
    """The logit of one class: the relevance sums up to it.

    Attributes:
        index: The class.
        position: Of three axes and more, the only place of the second that counts; None is all.
    """

    index: Index = None
    position: int | None = None

    def everywhere(self, output: Any, label: Any) -> Any:
        """One for the class, else zero."""
        return one_hot(output, self.index, label)


@dataclass(frozen=True)
class Contrastive(Placed):
    """A logit against the mean of all: 1 for the class, ``-1/N`` for the others.

    Attributes:
        index: The class.
        position: As in `Logit`.
    """

    index: Index = None
    position: int | None = None

    def everywhere(self, output: Any, label: Any) -> Any:
        """``1`` and ``-1/N`` with the number of classes `N`."""
        chosen = one_hot(output, self.index, label)
        share = 1.0 / int(output.shape[-1])
        return chosen * (1.0 + share) - share


@dataclass(frozen=True)
class Difference(Placed):
    """The difference of two logits.

    Attributes:
        first: The class that counts.
        second: The class that counts against it.
        position: As in `Logit`.
    """

    first: int
    second: int
    position: int | None = None

    def everywhere(self, output: Any, label: Any) -> Any:
        """``1`` and ``-1``."""
        return one_hot(output, self.first) - one_hot(output, self.second)


@dataclass(frozen=True)
class SoftmaxGradient(Placed):
    """The gradient of a probability: ``p_c (1 - p_c)`` for the class, ``-p_c p_k`` for others.

    Attributes:
        index: The class.
        position: As in `Logit`.
    """

    index: Index = None
    position: int | None = None

    def everywhere(self, output: Any, label: Any) -> Any:
        """``p_c (1_c - p)``."""
        chosen = one_hot(output, self.index, label)
        shares = aten.softmax.int(output, -1)
        of_class = aten.sum.dim_IntList(shares * chosen, [-1], True)
        return (chosen - shares) * of_class


@dataclass(frozen=True)
class At:
    """One entry of the output.

    Attributes:
        index: One number for each axis from the first on; None and missing axes count whole.
            Negative numbers count from the end.
    """

    index: tuple[int | None, ...]

    def __call__(self, output: Any, label: Any = None) -> Any:
        """One there, else zero."""
        if len(self.index) > output.ndim:
            raise ValueError(f"target {self.index} has more axes than the output, {output.ndim}")
        found = full_like(output, 1.0)
        for axis, place in enumerate(self.index):
            found = found if place is None else _kept(found, axis, place)
        return found


AnySeed = Logit | Contrastive | Difference | SoftmaxGradient | At


def one_hot(output: Any, index: Index, label: Any = None) -> Any:
    """One for a class along the last axis, else zero; equal largest classes count alike."""
    ones = full_like(output, 1.0)
    if index is not None:
        return _kept(ones, output.ndim - 1, index)
    if label is None:
        largest = aten.amax.default(output, [-1], True)
        return aten.where.ScalarOther(output == largest, ones, 0.0)
    classes = aten.arange.start_step(0, output.shape[-1], 1, dtype=torch.int64)
    rows = aten.reshape.default(label, [-1, *[1] * (output.ndim - 1)])
    return aten.where.ScalarOther(aten.eq.Tensor(rows, classes), ones, 0.0)


def _kept(value: Any, axis: int, place: int) -> Any:
    """`value` with zeros everywhere but at one place of an axis.

    Raises:
        ValueError: An axis of fixed size has no such place.
    """
    size = value.shape[axis]
    if isinstance(size, int) and not -size <= place < size:
        raise ValueError(f"there is no place {place} on an axis of size {size}")
    places = aten.arange.start_step(0, size, 1, dtype=torch.int64)
    if place < 0:
        # Counted from the end, whose place is known when the graph runs.
        places = places - size
    shape = [-1 if other == axis else 1 for other in range(value.ndim)]
    chosen = aten.reshape.default(places == place, shape)
    return aten.where.ScalarOther(chosen, value, 0.0)


_KINDS: dict[str, tuple[Callable[..., AnySeed], int]] = {
    "logit": (Logit, 1),
    "contrastive": (Contrastive, 1),
    "softmax": (SoftmaxGradient, 1),
    "difference": (Difference, 2),
}


def parse_seed(text: str, position: int | None = None) -> AnySeed:
    """A seed as text: ``logit``, ``logit:7``, ``contrastive:7``, ``softmax``, ``difference:7,9``.

    Raises:
        ValueError: The kind is unknown, or the classes are not numbers or too many.
    """
    kind, _, rest = text.partition(":")
    if kind not in _KINDS:
        raise ValueError(f"unknown seed {kind!r}{known_names(kind, _KINDS)}")
    make, most = _KINDS[kind]
    words = rest.split(",") if rest else []
    if not all(word.strip().isdigit() for word in words) or len(words) > most:
        raise ValueError(f"seed {text!r} names its classes wrong; {kind} takes {most} number(s)")
    if kind == "difference" and len(words) != most:
        raise ValueError(f"seed {text!r} needs two classes, as in 'difference:7,9'")
    return make(*map(int, words), position=position)
