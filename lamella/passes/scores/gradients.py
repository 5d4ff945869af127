"""Backward runs of a graph, and what gradients say about the errors of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.operators import REFERENCE
from lamella.ir.ops import aten, lam
from lamella.ir.quantize import Format
from lamella.ir.segments import Calls, Values, program
from lamella.passes.scores.target import LossTarget
from lamella.passes.sites import Site


class GradientRun:
    """Projects gradients on the errors of weights, sample by sample.

    For each weight and format it adds up ``<G, D>^2`` over samples and draws, where G is the
    gradient of the loss with respect to the weight, never kept, and D the error.
    """

    def __init__(
        self,
        graph: Graph,
        target: LossTarget,
        sites: Sequence[Site],
        formats: tuple[Format, ...],
        errors: Mapping[str, Tensor],
    ) -> None:
        """Watch the readers of `sites`.

        Args:
            graph: The graph.
            target: The output that the loss is taken of.
            sites: Weights of linear layers and embeddings.
            formats: What `errors` are the errors of.
            errors: Name of the weight -> ``[formats, out, in]``.
        """
        kept = [target.node] if target.mask is None else [target.node, target.mask]
        self._running = program(graph, kept)
        self._target = target
        self._formats = formats
        self._errors = errors
        self._site_of = {reader: site.weight for site in sites for reader in site.readers}
        self._projected: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[Node, Tensor] = {}
        self._tokens = 0
        self._draws = 0
        self._samples = 0

    def forward(self, sample: Mapping[str, Any]) -> Tensor:
        """The rows of the target for one sample, recorded for `backward`."""
        values = self._running.start(sample)
        for segment in self._running.segments:
            weights = segment.read_weights(self._running.graph)
            calls = _differentiable(segment.nodes)
            segment.run(values, weights, self._watch, calls=calls, gradients=True)
        rows = self._target.rows(values)
        self._tokens += rows.shape[0]
        self._samples += 1
        return rows

    def backward(self, loss: Tensor, *, again: bool) -> None:
        """Add the gradients of one loss.

        Args:
            loss: A scalar made of the rows that `forward` gave.
            again: Whether another loss of the same rows will come.
        """
        self._projected.clear()
        if loss.requires_grad:
            loss.backward(retain_graph=again)
        self._draws += 1
        for name, projected in self._projected.items():
            self._sums[name] = self._sums.get(name, 0) + projected.square()

    def loss(self, site: Site, format: Format) -> float:
        """Half the mean square of the projection, per token; 0 if no gradient reaches it."""
        if site.weight not in self._sums or self._tokens == 0:
            return 0.0
        return 0.5 * float(self._sums[site.weight][self._formats.index(format)]) / self._count

    def squares(self, reader: Node) -> Tensor | None:
        """The squared gradients at the output of a layer, per token: float64 ``[out]``."""
        found = self._squares.get(reader)
        return None if found is None else found / self._count

    @property
    def _count(self) -> float:
        """Tokens times draws per sample."""
        return self._tokens * self._draws / self._samples

    def _watch(self, node: Node, values: Values) -> None:
        if node not in self._site_of:
            return
        value: Tensor = values[node]
        if not value.requires_grad:
            value = values[node] = value.detach().requires_grad_()
        bound = ops.bind(node)
        is_table = node.target is aten.embedding.default
        read: Tensor = values[bound["indices" if is_table else "input"]].detach()
        value.register_hook(lambda gradient: self._add(node, read, gradient))

    def _add(self, node: Node, read: Tensor, gradient: Tensor) -> None:
        name = self._site_of[node]
        errors = self._errors[name]
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        if node.target is aten.embedding.default:
            changes = errors[:, read.reshape(-1)]
            projected = torch.einsum("ftk,tk->f", changes, rows)
        else:
            of_weight = rows.t() @ read.reshape(-1, read.shape[-1]).float()
            projected = errors.flatten(1) @ of_weight.flatten()
            squares = rows.double().square().sum(0)
            self._squares[node] = self._squares.get(node, 0) + squares
        self._projected[name] = self._projected.get(name, 0) + projected.double()


def _differentiable(nodes: Iterable[Node]) -> Calls:
    """Our own operators have no derivative; their references in plain PyTorch have."""
    return {node: _reference(node.target) for node in nodes if node.target in REFERENCE}


def _reference(target: Any) -> Any:
    """The derivative of rounding is zero almost everywhere; the gradient passes by it instead."""
    if target is lam.linear_nbits.default:
        return lambda *args: REFERENCE[target](*args[:7], False)
    if target is lam.linear_int8.default:
        return _dense_linear
    return REFERENCE[target]


def _dense_linear(
    input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, per_row: bool
) -> Tensor:
    return functional.linear(input, (weight * scales[:, None]).to(input.dtype), bias)
