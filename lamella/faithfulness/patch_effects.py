"""What patching does to a metric, measured or estimated, and how well two of them agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import GraphError, closest
from lamella.faithfulness.intervals import Interval, pearson, resampled
from lamella.faithfulness.patch_sites import PatchSite
from lamella.ir.graph import Graph

Metric = Callable[[Tensor], Tensor]
"""From the output of a model, ``[batch, …]``, to one number for each pair, ``[batch]``."""


@dataclass(frozen=True)
class PatchEffects:
    """How much a metric changes when one part of a corrupted run becomes that of a clean run.

    Attributes:
        values: Site -> the effect of each unit for each pair, float64 ``[pairs, *units]``.
        clean: The metric of the clean inputs, ``[pairs]``.
        corrupt: The metric of the corrupted inputs, ``[pairs]``.
    """

    values: Mapping[PatchSite, Tensor] = field(repr=False)
    clean: Tensor
    corrupt: Tensor

    def of(self, kind: str) -> Tensor:
        """The effects of all units of all sites of a kind, ``[pairs, units]``.

        Raises:
            ValueError: There are no sites of the kind.
        """
        kinds = dict.fromkeys(site.kind for site in self.values)
        if kind not in kinds:
            raise ValueError(
                f"no {kind!r} was patched{closest(kind, kinds)}; there are {', '.join(kinds)}"
            )
        found = [v.reshape(len(v), -1) for site, v in self.values.items() if site.kind == kind]
        return torch.cat(found, dim=1)


def patching_agreement(
    measured: PatchEffects,
    estimated: PatchEffects,
    kind: str,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Pearson correlation of measured and estimated effects over all units of a kind.

    Effects are averaged over pairs first; the interval is that of pairs drawn with replacement.
    Units without any effect by either (before the first difference of a pair, or that nothing
    reads) are left out: they agree without saying anything.

    Args:
        measured: Of `activation_patching`.
        estimated: Of `relevance_patching`, for the same sites and pairs.
        kind: Of the sites.
        level: Share of the draws inside of the interval.
        draws: How many.
        seed: Of the draws.

    Raises:
        ValueError: The two are not of the same sites, or no unit has an effect.

    References:
        [Jafari2025], section 4.
    """
    one, other = measured.of(kind), estimated.of(kind)
    if one.shape != other.shape:
        raise ValueError(
            f"effects of the same sites and pairs are compared, got {list(one.shape)} and "
            f"{list(other.shape)}"
        )
    shown = (one != 0).any(0) | (other != 0).any(0)
    if not bool(shown.any()):
        raise ValueError(f"no unit of kind {kind!r} has any effect")
    one, other = one[:, shown], other[:, shown]

    def correlation(weights: Tensor) -> Tensor:
        return pearson(weights @ one, weights @ other)

    return resampled(correlation, len(one), level=level, draws=draws, seed=seed)


def site_nodes(graph: Graph, sites: Iterable[PatchSite]) -> dict[PatchSite, Node]:
    """The node of each site.

    Raises:
        GraphError: The graph has no such operation.
        ValueError: There are no sites.
    """
    by_name = {node.name: node for node in graph.nodes if node.op == "call_function"}
    found: dict[PatchSite, Node] = {}
    for site in sites:
        if site.node not in by_name:
            raise GraphError(
                f"the graph has no operation {site.node!r} to patch{closest(site.node, by_name)}"
            )
        found[site] = by_name[site.node]
    if not found:
        raise ValueError("there are no sites to patch; patch_sites gives those of a graph")
    return found


def explained_node(graph: Graph, output: str | int) -> Node:
    """The output that a metric is of.

    Raises:
        GraphError: The graph has no such output.
    """
    names = graph.signature.outputs
    if isinstance(output, str) and output not in names:
        raise GraphError(
            f"the model has no output {output!r}{closest(output, names)}; it has {', '.join(names)}"
        )
    place = names.index(output) if isinstance(output, str) else output
    if not -len(names) <= place < len(names):
        raise GraphError(f"the model has {len(names)} outputs, there is no output {place}")
    return graph.outputs[place]


def measured_metric(metric: Metric, output: Tensor) -> Tensor:
    """One number for each pair, float64.

    Raises:
        ValueError: The metric gives another shape.
    """
    value = metric(output)
    if value.shape != output.shape[:1]:
        raise ValueError(
            f"the metric must give one number for each of {output.shape[0]} pairs, got shape "
            f"{list(value.shape)}"
        )
    return value.double()


def check_pair(clean: Tensor, corrupt: Tensor, site: PatchSite, pairs: int) -> None:
    """Refuse values of a site that can't be exchanged.

    Raises:
        ValueError: Their shapes differ, the batch is not their first axis, or an axis of the
            units is not there.
    """
    if clean.shape != corrupt.shape or not clean.ndim or clean.shape[0] != pairs:
        raise ValueError(
            f"{site.node} is {list(clean.shape)} of the clean and {list(corrupt.shape)} of the "
            f"corrupted inputs; both must be alike, with {pairs} pairs along the first axis"
        )
    if not all(0 < axis < clean.ndim for axis in site.units):
        raise ValueError(f"units of {site.node} must be axes from 1 to {clean.ndim - 1}")
