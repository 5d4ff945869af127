"""Backward runs of a graph: gradients are shown to watchers when they are made, and not kept."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.integer_operators import INTEGER_REFERENCE
from lamella.ir.operators import REFERENCE
from lamella.ir.ops import aten, lam
from lamella.ir.rounding_operators import ROUNDING_REFERENCE
from lamella.ir.segments import Values, program
from lamella.passes.scores.target import LossTarget
from lamella.passes.sites import Site


class Watcher(abc.ABC):
    """Makes something of the gradients at the layers that read some weights."""

    @abc.abstractmethod
    def outputs(self, reader: Node, read: Tensor, gradient: Tensor) -> None:
        """The gradient at what a layer computed.

        Args:
            reader: A linear layer or an embedding.
            read: Its input, ``[tokens, in]``, or the indices of an embedding, ``[tokens]``.
            gradient: ``[tokens, out]``, float32.
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
        """The gradients of one loss have all been seen."""


class GradientRun:
    """Runs a graph forwards and backwards, sample by sample, and shows gradients to watchers.

    A forward run is one for the cost, and a backward run about another: gradients of activations
    alone are computed, those of weights are the business of watchers.

    Attributes:
        tokens: Rows of the target that were run, each time a loss of them was taken.
    """

    def __init__(
        self,
        graph: Graph,
        target: LossTarget,
        sites: Sequence[Site],
        watchers: Sequence[Watcher],
    ) -> None:
        """Watch the readers of `sites`.

        Args:
            graph: The graph.
            target: The output that the loss is taken of.
            sites: Weights of linear layers and embeddings.
            watchers: Who is shown gradients.
        """
        kept = [target.node] if target.mask is None else [target.node, target.mask]
        self.tokens = 0
        self._running = program(graph, kept)
        self._target = target
        self._readers = {reader for site in sites for reader in site.readers}
        self._watchers = watchers
        self._rows = 0

    def forward(self, sample: Mapping[str, Any]) -> Tensor:
        """The rows of the target for one sample, recorded for `backward`."""
        values = self._running.start(sample)
        for segment in self._running.segments:
            weights = segment.read_weights(self._running.graph)
            calls = differentiable(segment.nodes)
            linears = [node for node in segment.nodes if self._is_linear(node)]
            calls |= {node: self._linear(node) for node in linears}
            segment.run(values, weights, self._watch, calls=calls, gradients=True)
        rows = self._target.rows(values)
        self._rows = rows.shape[0]
        return rows

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

    def _is_linear(self, node: Node) -> bool:
        return node in self._readers and node.target is aten.linear.default

    def _watch(self, node: Node, values: Values) -> None:
        if node not in self._readers:
            return
        value: Tensor = values[node]
        if not value.requires_grad:
            value = values[node] = value.detach().requires_grad_()
        is_table = node.target is aten.embedding.default
        read: Tensor = values[ops.bind(node)["indices" if is_table else "input"]].detach()
        flat = read.reshape(-1) if is_table else read.reshape(-1, read.shape[-1])

        def show(gradient: Tensor) -> None:
            for watcher in self._watchers:
                watcher.outputs(node, flat, gradient.reshape(-1, gradient.shape[-1]).float())

        value.register_hook(show)

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
