"""How many different things the tokens behind every block are: entropy of their clusters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lamella.ir.graph import Graph
from lamella.ir.reducers import SampledRows
from lamella.ir.runner import Request
from lamella.passes.analyses.stream_cosine import channel_axis
from lamella.passes.base import Analyses, Analysis

_ROUNDS = 50


@dataclass(frozen=True)
class ActivationEntropyReport:
    """Scores of `ActivationEntropy`.

    Attributes:
        blocks: Name of the block -> entropy in nats, in [0, log(clusters)]; larger means that the
            block needs more bits.
    """

    blocks: Mapping[str, float]


@dataclass(frozen=True)
class ActivationEntropy(Analysis[ActivationEntropyReport]):
    """``-sum_c p_c log p_c`` over the clusters of the tokens behind every block.

    Tokens are clustered by k-means, and ``p_c`` is the share of cluster c. Blocks of low entropy
    are those that LUQ gives the fewest bits. Tokens of all modalities are clustered together, so
    samples have to hold them in the proportion of use.

    Attributes:
        clusters: How many, 100 in the paper.
        tokens: The most tokens that are clustered, spread over all samples.
        seed: Of the first centers.

    Raises:
        ValueError: `clusters` is smaller than 2, or `tokens` smaller than `clusters`.

    References:
        [Bhatnagar2025], section 3.2.
    """

    name: ClassVar[str] = "activation-entropy"

    clusters: int = 100
    tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clusters < 2 or self.tokens < self.clusters:
            raise ValueError(
                f"clusters must be at least 2 and tokens at least clusters, got {self.clusters} "
                f"and {self.tokens}"
            )

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """Rows behind every block."""
        return tuple(self._requests(graph).values())

    def run(self, graph: Graph, analyses: Analyses) -> ActivationEntropyReport:
        """Run the samples once and cluster."""
        requests = self._requests(graph)
        known = analyses.statistics(requests.values())
        least = min((known[request].shape[0] for request in requests.values()), default=0)
        if requests and least < self.clusters:
            analyses.remark(
                f"the samples hold {least} tokens; {self.clusters} clusters need {self.clusters}, "
                f"and some ten times as many to mean something"
            )
        return ActivationEntropyReport(
            {name: self._entropy(known[request]) for name, request in requests.items()}
        )

    def _requests(self, graph: Graph) -> dict[str, Request]:
        return {
            block.name: Request.of(
                SampledRows(self.tokens),
                block.exit,
                channel_axis=channel_axis(block.exit, block.nodes),
            )
            for block in graph.blocks
        }

    def _entropy(self, rows: Tensor) -> float:
        count = min(self.clusters, rows.shape[0])
        return entropy(clustered(rows, count, self.seed))


def entropy(labels: Tensor) -> float:
    """The entropy in nats of the shares of the labels.

    Args:
        labels: int64, ``[tokens]``.
    """
    shares = labels.bincount().double() / labels.numel()
    return float(torch.special.entr(shares).sum())


def clustered(rows: Tensor, count: int, seed: int) -> Tensor:
    """The cluster of each row by k-means, from spread out first centers.

    Args:
        rows: ``[rows, channels]``.
        count: Clusters, at most as many as rows.
        seed: Of the first centers.

    Returns:
        int64, ``[rows]``; a cluster may be empty.

    References:
        [Arthur2007], for the first centers.
    """
    centers = _first_centers(rows, count, torch.Generator().manual_seed(seed))
    labels = torch.cdist(rows, centers).argmin(1)
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centers).index_add_(0, labels, rows)
        sizes = labels.bincount(minlength=count)[:, None]
        # An empty cluster stays where it is.
        centers = torch.where(sizes > 0, sums / sizes.clamp(min=1), centers)
        moved = torch.cdist(rows, centers).argmin(1)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def _first_centers(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows drawn one after the other, by their squared distance from those drawn before."""
    first = torch.randint(rows.shape[0], (1,), generator=generator)
    chosen = [rows[first]]
    nearest = torch.cdist(rows, chosen[0]).squeeze(1).square()
    while len(chosen) < count:
        # Rows that are all alike: any of them.
        weights = nearest if float(nearest.sum()) > 0 else torch.ones_like(nearest)
        pick = torch.multinomial(weights, 1, generator=generator)
        chosen.append(rows[pick])
        nearest = torch.minimum(nearest, torch.cdist(rows, chosen[-1]).squeeze(1).square())
    return torch.cat(chosen)
