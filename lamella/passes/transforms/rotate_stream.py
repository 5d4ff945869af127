"""Turn the basis of the residual stream by a random rotation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.sites import FOLDED
from lamella.passes.stream_basis import Basis, find_bases

KINDS = ("hadamard", "orthogonal")
"""How the rotation is drawn."""


@dataclass(frozen=True)
class RotateStream(Transform):
    """Write the residual stream in a random basis: the same function, no channel stands out.

    With a rotation `R`, tables and layers that write to the stream get ``E R`` and ``R^T W``,
    layers that read it ``W R``; `rms_norm` sees only lengths. Outliers of single channels are
    spread over all, weights and activations become nearly normal, which helps formats of few bits
    with one scale for many channels. Run `fold-norms` before: a norm that still has a scale (its
    layer shares a weight with the embedding) keeps it as a dense layer of its own,
    ``R^T diag(g) R``, which costs a product of the width squared.

    Streams are found by structure (`lamella.passes.stream_basis`). One with `layer_norm`, one that
    an output shows, or one that anything else reads stays as it is and is reported.

    Attributes:
        kind: ``"hadamard"``: a Hadamard matrix with random signs, all entries alike (times a
            random rotation of the odd factor of the width); ``"orthogonal"``: uniformly drawn.
        seed: Of the rotation.

    Raises:
        ValueError: `kind` is another word.

    References:
        [Ashkboos2024], section 4, stage 1a, without the rotations inside of attention and MLP.
    """

    name: ClassVar[str] = "rotate-stream"
    effect: ClassVar[Effect] = Effect.EXACT

    kind: str = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Turn every stream that can."""
        bases = find_bases(graph)
        generator = torch.Generator().manual_seed(self.seed)
        turned = kept = 0
        for basis in bases:
            if basis.obstacle:
                analyses.remark(f"a stream of width {basis.width} stays: {basis.obstacle}")
                continue
            rotation = drawn(basis.width, self.kind, generator)
            kept += _turn(graph, basis, rotation)
            turned += 1
        if not bases:
            analyses.remark("no stream to rotate: there is no rms_norm over the last axis")
        if turned:
            more = f"; {kept} norms kept their scale as a dense layer" if kept else ""
            analyses.note(f"turned {turned} streams{more}")


def drawn(width: int, kind: str, generator: torch.Generator) -> Tensor:
    """A rotation or reflection, float64 ``[width, width]``.

    Args:
        width: Any size.
        kind: One of `KINDS`.
        generator: What it is drawn from.
    """
    power = math.gcd(width, 1 << 30) if kind == "hadamard" else 1
    odd = width // power
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < power:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        ) / math.sqrt(2)
    drawn_matrix = torch.randn(odd, odd, dtype=torch.float64, generator=generator)
    rest, upper = torch.linalg.qr(drawn_matrix)
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return signs[:, None] * torch.kron(hadamard, (rest * upper.diagonal().sign()).contiguous())


def _turn(graph: Graph, basis: Basis, rotation: Tensor) -> int:
    """Turn the weights of a basis; how many norms kept their scale."""
    kept = 0
    for norm in basis.norms:
        if graph.operand(norm, "weight") is not None:
            _scale_behind(graph, norm, rotation)
            kept += 1
    done: set[Node] = set()
    for node, uses in basis.weights.items():
        weight = node if node.op == "get_attr" else graph.operand(node, "weight")
        if "rows" in uses and node.target is aten.linear.default:
            _turn_bias(graph, node, rotation)
        if weight in done:
            continue
        done.add(weight)
        value = graph.weight(weight)
        new = value.double()
        if "rows" in uses:
            new = rotation.T @ new
        if "columns" in uses:
            new = new @ rotation
        _store(graph, weight, new.to(value.dtype))
    return kept


def _turn_bias(graph: Graph, layer: Node, rotation: Tensor) -> None:
    bias = graph.operand(layer, "bias")
    if bias is None:
        return
    value = graph.weight(bias)
    new = (value.double() @ rotation).to(value.dtype)
    if list(bias.users) == [layer]:
        _store(graph, bias, new)
    else:
        graph.set_operand(layer, "bias", graph.add_weight(f"{layer.name}.turned_bias", new))


def _scale_behind(graph: Graph, norm: Node, rotation: Tensor) -> None:
    """A scale `g` in the turned basis is a layer ``R^T diag(g) R`` behind the bare norm."""
    scale = graph.weight(graph.operand(norm, "weight"))
    matrix = (rotation.T * scale.double()) @ rotation
    weight = graph.add_weight(f"{norm.name}.turned_scale", matrix.T.to(scale.dtype).contiguous())
    graph.set_operand(norm, "weight", None)
    readers = list(norm.users)
    layer = graph.call(aten.linear.default, norm, weight, after=norm, like=norm)
    for reader in readers:
        graph.reread(reader, norm, layer)


def _store(graph: Graph, node: Node, value: Tensor) -> None:
    graph.set_weight(node, value.contiguous())
    node.meta[FOLDED] = RotateStream.name
