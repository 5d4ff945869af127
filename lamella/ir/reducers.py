"""What is kept of a value while samples run: sums, maxima, Gram matrices, angles.

A reducer sees a value as rows, one per token, with padding taken out; a value with one channel
axis of any place is laid out as ``[tokens, channels]`` first. Sums over tokens are kept in
float64 where they are small, so that a statistic does not depend on how samples are batched.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

State = tuple[Tensor, ...]

_ROWS = 1024
_GOLDEN_RATIO = (5**0.5 - 1) / 2


class Reducer(abc.ABC):
    """A running statistic of one value, or of several values of the same tokens.

    Subclasses are frozen dataclasses: a reducer is part of the key of its result.

    Attributes:
        arity: How many values it reads.
    """

    arity: ClassVar[int] = 1

    @abc.abstractmethod
    def add(self, state: State | None, *values: Tensor) -> State:
        """The state after more tokens; None before the first.

        Args:
            state: What the last call returned.
            values: ``[tokens, channels]``, as many as `arity`, in the dtype of the graph.
        """

    @abc.abstractmethod
    def result(self, state: State) -> Tensor:
        """The statistic of all tokens."""


@dataclass(frozen=True)
class Mean(Reducer):
    """Mean over tokens, float64 ``[channels]``."""

    def add(self, state: State | None, *values: Tensor) -> State:
        """Sum and count."""
        (value,) = values
        return _summed(state, value.double().sum(0), value.shape[0])

    def result(self, state: State) -> Tensor:
        """``[channels]``."""
        return state[0] / state[1]


@dataclass(frozen=True)
class MeanSquare(Reducer):
    """Mean over tokens of the square, float64 ``[channels]``."""

    def add(self, state: State | None, *values: Tensor) -> State:
        """Sum of squares and count."""
        (value,) = values
        return _summed(state, value.double().square().sum(0), value.shape[0])

    def result(self, state: State) -> Tensor:
        """``[channels]``."""
        return state[0] / state[1]


@dataclass(frozen=True)
class MaxAbs(Reducer):
    """The largest magnitude over tokens, ``[channels]`` in the dtype of the value."""

    def add(self, state: State | None, *values: Tensor) -> State:
        """The maximum so far."""
        (value,) = values
        if value.shape[0] == 0:
            return state or (value.new_zeros(value.shape[1:]),)
        largest = value.abs().amax(0)
        return (largest if state is None else torch.maximum(state[0], largest),)

    def result(self, state: State) -> Tensor:
        """``[channels]``."""
        return state[0]


@dataclass(frozen=True)
class Extremes(Reducer):
    """The least and the largest entry of all tokens and channels, ``[2]``."""

    def add(self, state: State | None, *values: Tensor) -> State:
        """Both so far."""
        (value,) = values
        if not value.numel():
            return state or (value.new_zeros(2),)
        ends = torch.stack(value.aminmax())
        if state is None:
            return (ends,)
        return (torch.stack([torch.minimum(state[0], ends)[0], torch.maximum(state[0], ends)[1]]),)

    def result(self, state: State) -> Tensor:
        """``[2]``."""
        return state[0]


@dataclass(frozen=True)
class Count(Reducer):
    """The number of tokens, an int64 scalar."""

    def add(self, state: State | None, *values: Tensor) -> State:
        """The count so far."""
        count = torch.tensor(values[0].shape[0])
        return (count if state is None else state[0] + count,)

    def result(self, state: State) -> Tensor:
        """A scalar."""
        return state[0]


@dataclass(frozen=True)
class Gram(Reducer):
    """The mean over tokens of the outer product, ``X^T X / tokens``, ``[channels, channels]``.

    Attributes:
        double: Multiply and keep in float64, for ill-conditioned inputs; otherwise float32.
    """

    double: bool = False

    def add(self, state: State | None, *values: Tensor) -> State:
        """``X^T X`` and the count."""
        (value,) = values
        rows = value.double() if self.double else value.float()
        return _summed(state, rows.t() @ rows, value.shape[0])

    def result(self, state: State) -> Tensor:
        """Symmetric, ``[channels, channels]``."""
        return (state[0] / state[1]).to(state[0].dtype)


@dataclass(frozen=True)
class RoundingVariance(Reducer):
    """The variance that rounding to 8 bits adds to each channel, float64 ``[channels]``.

    A kernel with 8-bit activations rounds each block of `block` channels of a row to multiples
    of ``max|x| / 127`` (see `lamella::linear_nbits`): the mean over tokens of that step squared,
    divided by 12.
    """

    block: int

    def add(self, state: State | None, *values: Tensor) -> State:
        """Sum of the squared steps of each block, and the count."""
        (value,) = values
        pad = -value.shape[1] % self.block
        padded = functional.pad(value.float(), (0, pad)).unflatten(1, (-1, self.block))
        steps = (padded.abs().amax(2) / 127).double().square()
        width = torch.tensor(value.shape[1])
        total, count = _summed(state and state[:2], steps.sum(0), value.shape[0])
        return (total, count, width)

    def result(self, state: State) -> Tensor:
        """``[channels]``."""
        total, count, width = state
        return (total / count / 12).repeat_interleave(self.block)[: int(width)]


@dataclass(frozen=True)
class RowMaxima(Reducer):
    """The largest magnitude of each token, float32 ``[tokens]``, in the order of the samples."""

    def add(self, state: State | None, *values: Tensor) -> State:
        """One number for each token."""
        (value,) = values
        largest = value.abs().amax(1).float()
        return (largest if state is None else torch.cat([state[0], largest]),)

    def result(self, state: State) -> Tensor:
        """``[tokens]``."""
        return state[0]


@dataclass(frozen=True)
class SampledRows(Reducer):
    """Rows of some tokens, spread evenly over all, float32 ``[at most limit, channels]``.

    Token i has the priority ``frac((i + seed) * golden ratio)``, and those of least priority are
    kept: which they are does not depend on how samples are batched.

    Attributes:
        limit: The most rows that are kept.
        seed: Another choice of tokens.
    """

    limit: int
    seed: int = 0

    def add(self, state: State | None, *values: Tensor) -> State:
        """The rows of least priority so far, their priorities, and the count of all."""
        (value,) = values
        seen = 0 if state is None else int(state[2])
        index = torch.arange(seen, seen + value.shape[0], dtype=torch.float64)
        priorities = (index + self.seed) * _GOLDEN_RATIO % 1.0
        rows = value.float()
        if state is not None:
            rows, priorities = torch.cat([state[0], rows]), torch.cat([state[1], priorities])
        order = priorities.argsort(stable=True)[: self.limit]
        return (rows[order], priorities[order], torch.tensor(seen + value.shape[0]))

    def result(self, state: State) -> Tensor:
        """The rows in the order of their priority."""
        return state[0]


@dataclass(frozen=True)
class MeanCosine(Reducer):
    """Mean over tokens of the cosine of two values, a float64 scalar in [-1, 1]."""

    arity: ClassVar[int] = 2

    def add(self, state: State | None, *values: Tensor) -> State:
        """Sum of cosines and count."""
        first, second = (value.float() for value in values)
        cosines = functional.cosine_similarity(first, second, dim=-1, eps=1e-12)
        return _summed(state, cosines.double().sum(), first.shape[0])

    def result(self, state: State) -> Tensor:
        """A scalar."""
        return state[0] / state[1]


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """``KL(softmax(reference) || softmax(logits))`` in nats over the last axis, as float64.

    Computed from float32 log-probabilities and summed in float64; rounding can make it
    negative by about 1e-7, which is left as it is.
    """
    p = functional.log_softmax(reference.float(), dim=-1)
    q = functional.log_softmax(logits.float(), dim=-1)
    return (p.exp() * (p - q)).sum(-1, dtype=torch.float64)


def _summed(state: State | None, total: Tensor, count: int) -> State:
    counted = torch.tensor(float(count), dtype=torch.float64)
    return (total, counted) if state is None else (state[0] + total, state[1] + counted)
