"""Products of the Hessian of the loss with vectors, one block of it for each weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lamella.ir.graph import Graph
from lamella.ir.segments import program
from lamella.passes.scores.gradients import differentiable
from lamella.passes.scores.target import LossTarget
from lamella.passes.sites import Site


class Hessian:
    """The Hessian of the mean loss per token with respect to some weights, at the model as it is.

    The loss is that against the model's own output, so its gradient is zero and its Hessian is
    the Fisher matrix. A forward and a backward run of all samples are kept in memory with the
    graph of the backward run; attention runs as plain matrix products, since fused kernels have
    no second derivative.
    """

    def __init__(
        self,
        graph: Graph,
        target: LossTarget,
        sites: Sequence[Site],
        samples: Iterable[Mapping[str, Any]],
    ) -> None:
        """Run the samples forwards and backwards."""
        self._leaves = {site.weight: _leaf(graph, site) for site in sites}
        leaves = {site.node: self._leaves[site.weight] for site in sites}
        with sdpa_kernel(SDPBackend.MATH):
            losses = [_loss(graph, target, leaves, sample) for sample in samples]
            total = torch.stack([loss for loss, _ in losses]).sum()
            mean = total / sum(tokens for _, tokens in losses)
            found = torch.autograd.grad(
                mean, list(self._leaves.values()), create_graph=True, materialize_grads=True
            )
        named = zip(self._leaves, found, strict=True)
        self._gradients = {n: g for n, g in named if g.requires_grad}

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights by name; those that the loss does not depend on are left out."""
        return {name: self._leaves[name].detach() for name in self._gradients}

    def product(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The Hessian times a vector.

        Args:
            vectors: Name of the weight -> its part of the vector; zero for the others.

        Returns:
            The same weights' parts of the product.
        """
        names = [name for name in vectors if name in self._gradients]
        with sdpa_kernel(SDPBackend.MATH):
            found = torch.autograd.grad(
                [self._gradients[name] for name in names],
                [self._leaves[name] for name in names],
                [vectors[name] for name in names],
                retain_graph=True,
                materialize_grads=True,
            )
        return dict(zip(names, found, strict=True))


def traces(hessian: Hessian, probes: int, seed: int) -> dict[str, float]:
    """The trace of the block of each weight, by Hutchinson's method.

    Every probe is one vector of random signs over all weights; the blocks between two weights
    add noise and no bias.

    Args:
        hessian: Of some weights.
        probes: How many vectors.
        seed: Of the signs.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = dict.fromkeys(hessian.weights, 0.0)
    for _ in range(probes):
        signs = {name: _signs(weight, generator) for name, weight in hessian.weights.items()}
        for name, product in hessian.product(signs).items():
            totals[name] += float((product.double() * signs[name]).sum()) / probes
    return totals


def largest_eigenvalues(
    hessian: Hessian, rounds: int, tolerance: float, seed: int
) -> dict[str, float]:
    """The largest eigenvalue of the block of each weight, by power iteration.

    Args:
        hessian: Of some weights.
        rounds: The most products for a weight.
        tolerance: Stops when the estimate changes by a smaller share.
        seed: Of the first vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {}
    for name, weight in hessian.weights.items():
        vector = _signs(weight, generator) / weight.numel() ** 0.5
        value = 0.0
        for _ in range(rounds):
            product = hessian.product({name: vector})[name]
            before, value = value, float((product.double() * vector).sum())
            size = float(product.norm())
            if size == 0.0 or abs(value - before) < tolerance * abs(value):
                break
            vector = product / size
        found[name] = value
    return found


def _leaf(graph: Graph, site: Site) -> Tensor:
    return graph.weight(site.node).detach().clone().requires_grad_()


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(0, 2, weight.shape, generator=generator) - 1).to(weight.dtype)


def _loss(
    graph: Graph, target: LossTarget, leaves: Mapping[Node, Tensor], sample: Mapping[str, Any]
) -> tuple[Tensor, int]:
    """The summed loss of one sample against itself, and its tokens."""
    kept = [target.node] if target.mask is None else [target.node, target.mask]
    running = program(graph, kept)
    values = running.start(sample)
    for segment in running.segments:
        read = segment.read_weights(graph)
        weights = {node: leaves.get(node, value) for node, value in read.items()}
        segment.run(values, weights, calls=differentiable(segment.nodes), gradients=True)
    rows = target.rows(values)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if target.kind == "logits":
        logs = functional.log_softmax(rows, dim=-1)
        return -(logs.detach().exp() * logs).sum(), rows.shape[0]
    cosines = functional.cosine_similarity(rows, rows.detach(), dim=-1)
    return (1.0 - cosines).sum(), rows.shape[0]
