"""Backward runs of a graph: gradients are shown to watchers when they are made, and not kept."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.data import Batch, Samples
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.integer_operators import INTEGER_REFERENCE
from lamella.ir.operators import REFERENCE
from lamella.ir.ops import aten, lam
from lamella.ir.rounding_operators import ROUNDING_REFERENCE
from lamella.ir.segments import Values, program
from lamella.passes.scores.attention import attention
from lamella.passes.scores.sequences import HeldBytes, find_sequences
from lamella.passes.scores.target import LossTarget, sequence_count, split_batches
from lamella.passes.sites import Site

_HELD_BYTES = 1 << 30
"""Values of sequences that run together; longer sequences run in smaller parts of their batch."""


class Watcher(abc.ABC):
    """Makes something of the gradients at the layers that read some weights."""

    @abc.abstractmethod
    def start(self, sequences: int) -> None:
        """So many sequences have run forwards together."""

    @abc.abstractmethod
    def outputs(self, reader: Node, read: Tensor, gradient: Tensor) -> None:
        """The gradient at what a layer computed: for each sequence that of its own loss.

        Args:
            reader: A linear layer or an embedding.
            read: Its input, ``[sequences, tokens, in]``, or the indices of an embedding,
                ``[sequences, tokens]``.
            gradient: ``[sequences, tokens, out]``, float32.
        """

    @abc.abstractmethod
    def inputs(self, reader: Node, read: Tensor, gradient: Tensor) -> None:
        """The gradient at what a linear layer read, by way of this layer alone.

        Args:
            reader: A linear layer.
            read: Its input, ``[tokens, in]``.
            gradient: ``[tokens, in]``, float32.
        """

    @abc.abstractmethod
    def finish(self) -> None:
        """The gradients of one loss of each sequence have all been seen."""


class GradientRun:
    """Runs a graph forwards and backwards, batch by batch, and shows gradients to watchers.

    A forward run is one for the cost, and a backward run about another: gradients of activations
    alone are computed, those of weights are the business of watchers.

    The loss of a batch is the sum over its sequences, so that where no operation mixes them, the
    gradient at what belongs to a sequence is that of its own loss. Where one might
    (`find_sequences`), sequences run one at a time.

    Attributes:
        tokens: Rows of the target that were run, each time a loss of them was taken.
        remark: Why sequences run one at a time; empty where they do not, or are meant to.
    """

    def __init__(
        self,
        graph: Graph,
        target: LossTarget,
        sites: Sequence[Site],
        watchers: Sequence[Watcher],
        *,
        together: bool = True,
    ) -> None:
        """Watch the readers of `sites`.

        Args:
            graph: The graph.
            target: The output that the loss is taken of.
            sites: Weights of linear layers and embeddings.
            watchers: Who is shown gradients.
            together: Whether sequences may run in batches.
        """
        kept = [target.node] if target.mask is None else [target.node, target.mask]
        self.tokens = 0
        self._running = program(graph, kept)
        self._target = target
        self._readers = {reader for site in sites for reader in site.readers}
        self._watchers = watchers
        found = find_sequences(graph, target, sites) if together else ""
        self._sequences = None if isinstance(found, str) else found
        self.remark = f"sequences run one at a time: {found}" if isinstance(found, str) else ""
        nodes = (node for segment in self._running.segments for node in segment.nodes)
        self._held = HeldBytes.of(graph, nodes)
        self._count, self._rows = 1, 0

    def batches(self, samples: Samples) -> Iterator[Batch]:
        """The samples, cut to what may run together and is held in memory."""
        return split_batches(samples, self._most)

    def forward(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """Run some sequences, and record them for `backward`.

        Returns:
            The rows of the target, and how many of them are those of each sequence.
        """
        self._count = (self._sequences and sequence_count(batch)) or 1
        values = self._running.start(batch)
        for segment in self._running.segments:
            weights = segment.read_weights(self._running.graph)
            calls = differentiable(segment.nodes)
            for node in segment.nodes:
                if node.target is aten.scaled_dot_product_attention.default:
                    calls[node] = attention
                elif node.target is aten.linear.default and node in self._readers:
                    calls[node] = self._linear(node)
            segment.run(values, weights, self._watch, calls=calls, gradients=True)
        rows = self._target.rows(values)
        self._rows = rows.shape[0]
        for watcher in self._watchers:
            watcher.start(self._count)
        return rows, self._counts(values)

    def _most(self, batch: Batch) -> int:
        """How many sequences of a batch run together."""
        count = sequence_count(batch)
        if self._sequences is None or count is None:
            return 1
        held = self._held.at(batch)
        return 1 if held is None else max(1, _HELD_BYTES * count // max(1, held))

    def _counts(self, values: Values) -> list[int]:
        """Rows of the target for each sequence."""
        if self._target.mask is None:
            return [self._rows // self._count] * self._count
        shown: Tensor = values[self._target.mask].bool()
        return shown.reshape(self._count, -1).sum(1).tolist()

    def backward(self, loss: Tensor, *, again: bool) -> None:
        """Show the gradients of one loss.

        Args:
            loss: A scalar made of the rows that `forward` gave.
            again: Whether another loss of the same rows will come.
        """
        if loss.requires_grad:
            loss.backward(retain_graph=again)
        self.tokens += self._rows
        for watcher in self._watchers:
            watcher.finish()

    def _watch(self, node: Node, values: Values) -> None:
        if node not in self._readers:
            return
        value: Tensor = values[node]
        is_table = node.target is aten.embedding.default
        operand: Node = ops.bind(node)["indices" if is_table else "input"]
        constant = operand.op == "get_attr"
        read: Tensor = self._running.graph.weight(operand) if constant else values[operand]
        read = read.detach()
        if self._count > 1 and self._sequences and node in self._sequences.shared:
            value, read = (_copies(one, self._count) for one in (value, read))
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        values[node] = value
        apart = self._apart(node, read, () if is_table else read.shape[-1:])

        def show(gradient: Tensor) -> None:
            own = self._apart(node, gradient, gradient.shape[-1:]).float()
            for watcher in self._watchers:
                watcher.outputs(node, apart, own)

        value.register_hook(show)

    def _apart(self, node: Node, value: Tensor, channels: Sequence[int]) -> Tensor:
        """What a layer read, or a gradient, as ``[sequences, tokens, *channels]``."""
        if self._count > 1 and self._sequences and node in self._sequences.axes:
            value = value.movedim(self._sequences.axes[node], 0)
        return value.reshape(self._count, -1, *channels)

    def _linear(self, node: Node) -> Callable[..., Tensor]:
        """A linear layer that reads a view of its input, whose gradient is by way of it alone."""

        def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            view = input.view_as(input) if input.requires_grad else input.detach().requires_grad_()
            flat = input.detach().reshape(-1, input.shape[-1])

            def show(gradient: Tensor) -> None:
                for watcher in self._watchers:
                    watcher.inputs(node, flat, gradient.reshape(-1, gradient.shape[-1]).float())

            view.register_hook(show)
            return functional.linear(view, weight, bias)

        return linear


def _copies(value: Tensor, count: int) -> Tensor:
    """A value that all sequences share, once for each of them; not copied in memory."""
    return value.expand(count, *value.shape[1:] if value.shape[0] == 1 else value.shape)


def differentiable(nodes: Iterable[Node]) -> dict[Node, Callable[..., Any]]:
    """Our own operators have no derivative; their references in plain PyTorch have."""
    known = {*REFERENCE, *ROUNDING_REFERENCE, *INTEGER_REFERENCE}
    return {node: _reference(node.target) for node in nodes if node.target in known}


def _reference(target: Any) -> Any:
    """The derivative of rounding is zero almost everywhere; the gradient passes by it instead."""
    if target is lam.linear_nbits.default:
        return lambda *args: REFERENCE[target](*args[:7], False)
    if target in (lam.linear_int8.default, lam.linear_int8_static.default):
        return _dense_linear
    if target is lam.conv_int8.default:
        return _dense_convolution
    if target in ROUNDING_REFERENCE:
        return lambda input, *_: input
    return REFERENCE[target]


def _dense_linear(
    input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *_: Any
) -> Tensor:
    return functional.linear(input, (weight * scales[:, None]).to(input.dtype), bias)


def _dense_convolution(
    input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor:
    """The convolution of the floats that the codes stand for; the last of `rest` is its zero."""
    convolve: Any = functional.conv1d if weight.ndim == 3 else functional.conv2d
    dense = weight * scales.reshape(-1, *[1] * (weight.ndim - 1))
    result = convolve(input, dense.to(input.dtype), bias, *rest[:4])
    return result.relu() if rest[-1] == 0 else result
