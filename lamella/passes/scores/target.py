"""The output that a loss is measured on, and the loss of one token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.data import Batch, Samples
from lamella.errors import GraphError
from lamella.ir.graph import Graph
from lamella.ir.reducers import divergence
from lamella.ir.runner import token_mask
from lamella.passes.loss import comparisons

_ROWS = 512


@dataclass(frozen=True)
class LossTarget:
    """The output that is compared.

    Logits are compared by ``KL(softmax(reference) || softmax(value))`` in nats; other outputs
    by their direction, ``1 - cos``.

    Attributes:
        node: The output, ``[..., channels]``.
        kind: What it holds.
        mask: The attention mask of its rows, or None.
    """

    node: Node
    kind: Literal["logits", "embedding"]
    mask: Node | None

    @property
    def unit(self) -> str:
        """Of a loss."""
        return "KL per token" if self.kind == "logits" else "cosine distance per token"

    def rows(self, values: Mapping[Node, Any]) -> Tensor:
        """The output of one sample as ``[tokens, channels]``, without masked tokens."""
        value = values[self.node]
        rows = value.reshape(-1, value.shape[-1])
        return rows if self.mask is None else rows[values[self.mask].bool().flatten()]

    def loss(self, reference: Tensor, value: Tensor) -> float:
        """The sum over rows of the loss.

        Args:
            reference: ``[tokens, channels]``.
            value: As `reference`.
        """
        pieces = zip(reference.split(_ROWS), value.split(_ROWS), strict=True)
        return sum(float(self._of(one, other).sum()) for one, other in pieces)

    def _of(self, reference: Tensor, value: Tensor) -> Tensor:
        if self.kind == "logits":
            return divergence(reference, value)
        return 1.0 - functional.cosine_similarity(reference.double(), value.double(), dim=-1)


def loss_target(graph: Graph) -> LossTarget:
    """The first output that is compared as a distribution, or else the first vector.

    Raises:
        GraphError: There is neither.
    """
    nodes = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
    compared = [one for one in comparisons(graph) if one.measure != "relative"]
    if not compared:
        raise GraphError(
            f"no output of {', '.join(nodes)} is a distribution or a vector to measure a loss on"
        )
    logits = [one for one in compared if one.measure == "kl"]
    node = nodes[(logits or compared)[0].name]
    return LossTarget(node, "logits" if logits else "embedding", token_mask(graph, node))


def first_sequences(samples: Samples, count: int) -> Samples:
    """The first batches that hold at least `count` sequences together."""
    taken = 0
    for batches, batch in enumerate(samples, start=1):
        taken += next((int(v.shape[0]) for v in batch.values() if isinstance(v, Tensor)), 1)
        if taken >= count:
            return samples.take(batches)
    return samples


def sequence_count(batch: Batch) -> int | None:
    """How many sequences a batch holds; None where its inputs are not of one length."""
    sizes = {int(v.shape[0]) if isinstance(v, Tensor) and v.ndim else None for v in batch.values()}
    return sizes.pop() if len(sizes) == 1 else None


def single_sequences(samples: Samples) -> Iterator[Batch]:
    """The sequences one by one; a batch whose inputs are not of one length stays together.

    A batch that is not split gives the same result on average, with more noise.
    """
    return split_batches(samples, lambda _: 1)


def split_batches(samples: Samples, most: Callable[[Batch], int]) -> Iterator[Batch]:
    """The batches, cut where they hold more sequences than `most` says of them.

    A batch whose inputs are not of one length stays together.
    """
    for batch in samples:
        count = sequence_count(batch)
        step = 0 if count is None else most(batch)
        if count is None or count <= step:
            yield batch
            continue
        for row in range(0, count, step):
            yield {name: value[row : row + step] for name, value in batch.items()}


def sequence_generators(seed: int) -> Iterator[torch.Generator]:
    """A generator for each sequence: what is drawn for one does not hang on those beside it."""
    parent = torch.Generator().manual_seed(seed)
    while True:
        child = int(torch.randint(2**62, (), generator=parent))
        yield torch.Generator().manual_seed(child)


def random_signs(rows: int, channels: int, generator: torch.Generator) -> Tensor:
    """1 or -1 with equal probability, float32 ``[rows, channels]``."""
    count = rows * channels
    drawn = torch.randint(256, (math.ceil(count / 8),), generator=generator, dtype=torch.uint8)
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    signs = (2 * bits - 1).float()[drawn.long()]
    return signs.flatten()[:count].view(rows, channels)


def drawn_loss(rows: Tensor, target: LossTarget, generator: torch.Generator) -> Tensor:
    """`loss_of_signs` with random ones."""
    signs = random_signs(rows.shape[0], rows.shape[1], generator)
    return loss_of_signs(rows, target, signs)


def loss_of_signs(rows: Tensor, target: LossTarget, signs: Tensor) -> Tensor:
    """A sum over tokens whose gradients have the Fisher matrix as second moment.

    For logits with the probabilities p the gradient is ``sqrt(p) * s - p (sqrt(p) . s)`` with
    random signs s, whose second moment is ``diag(p) - p p^T``, as that of labels drawn from p.
    Labels need many more draws where p is close to one of them: nearly all of their gradients
    are close to zero there, and a few are large.

    Args:
        rows: ``[tokens, channels]``.
        target: What the rows hold.
        signs: Random ones, as `rows`.
    """
    if target.kind == "logits":
        shares = rows.detach().float().softmax(-1)
        drawn = shares.sqrt() * signs
        return (rows.float() * (drawn - shares * drawn.sum(-1, keepdim=True))).sum()
    return (functional.normalize(rows.float(), dim=-1) * signs).sum()
