"""The effect of single activations, measured: a corrupted run with one part of a clean run.

References:
    [Vig2020]; [Meng2022], section 2.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import GraphError
from lamella.faithfulness.patch_effects import (
    Metric,
    PatchEffects,
    check_pair,
    explained_node,
    measured_metric,
    site_nodes,
)
from lamella.faithfulness.patch_sites import PatchSite
from lamella.ir.graph import Graph
from lamella.ir.segments import Calls, Program, Segment, Values, program

Inputs = Mapping[str, Any]


def activation_patching(
    graph: Graph,
    clean: Inputs,
    corrupt: Inputs,
    sites: Iterable[PatchSite],
    metric: Metric,
    *,
    output: str | int = 0,
) -> PatchEffects:
    """Run the corrupted inputs once for every unit of every site, with its clean activation.

    The effect is the metric of that run minus the metric of the corrupted run. All pairs run
    together, and only the blocks from the site on run again: (units / 2) forwards on average.
    A unit whose activation is the same in both runs, for all pairs, has the effect 0 and is not
    run. Exchange `clean` and `corrupt` to learn what an activation breaks instead of what it
    restores.

    Args:
        graph: A canonical graph.
        clean: Inputs by name, a batch of pairs.
        corrupt: As `clean`, of the same shapes.
        sites: What is patched, for example `patch_sites`.
        metric: From the output to one number for each pair: a difference of logits.
        output: Which flat output the metric is of, by name or number.

    Raises:
        GraphError: A site or the output is not in the graph, or the output does not depend on
            a site.
        ValueError: There are no sites, shapes don't fit, or the metric is not one number for
            each pair.
    """
    nodes = site_nodes(graph, sites)
    target = explained_node(graph, output)
    running = program(graph, [target])
    runs = running.start(clean), running.start(corrupt)
    ends = [_end(running, values, 0, {})[target] for values in runs]
    before, after = (measured_metric(metric, end) for end in ends)
    trial = _Trial(running, target, metric, after)
    found: dict[PatchSite, Tensor] = {}
    for place, segment in enumerate(running.segments):
        here = {site: node for site, node in nodes.items() if node in segment.nodes}
        start, read = dict(runs[1]), segment.read_weights(graph)
        theirs = [_kept(segment, values, read, here.values()) for values in runs]
        for site, node in here.items():
            check_pair(theirs[0][node], theirs[1][node], site, len(after))
            patches = _patched(theirs[0][node], theirs[1][node], site.units)
            effects = [trial.effect(start, place, node, patched) for patched in patches]
            sizes = [theirs[0][node].shape[axis] for axis in site.units]
            found[site] = torch.stack(effects, dim=1).reshape(len(after), *sizes)
    unread = [site.node for site in nodes if site not in found]
    if unread:
        raise GraphError(f"output {output!r} does not depend on {', '.join(unread)}")
    return PatchEffects({site: found[site] for site in nodes}, before, after)


@dataclass(frozen=True)
class _Trial:
    """The corrupted run, to be changed at one node."""

    running: Program
    target: Node
    metric: Metric
    after: Tensor

    def effect(self, values: Values, place: int, node: Node, patched: Tensor | None) -> Tensor:
        """What the metric gains when `node`, in the segment at `place`, computes `patched`."""
        if patched is None:
            return torch.zeros_like(self.after)
        end = _end(self.running, values, place, {node: lambda *_, **__: patched})
        return measured_metric(self.metric, end[self.target]) - self.after


def _end(running: Program, values: Values, place: int, calls: Calls) -> Values:
    """The values at the end, from the segment at `place` on; `values` stays as it is."""
    now = dict(values)
    for segment in running.segments[place:]:
        segment.run(now, segment.read_weights(running.graph), calls=calls)
    return now


def _kept(
    segment: Segment, values: Values, weights: Mapping[Node, Tensor], nodes: Iterable[Node]
) -> dict[Node, Tensor]:
    """Run a segment and give what some of its nodes computed; `values` goes on behind it."""
    wanted, found = frozenset(nodes), dict[Node, Tensor]()

    def watch(node: Node, now: Values) -> None:
        if node in wanted:
            found[node] = now[node]

    segment.run(values, weights, watch)
    return found


def _patched(clean: Tensor, corrupt: Tensor, units: tuple[int, ...]) -> Iterator[Tensor | None]:
    """`corrupt` with one unit of `clean` after the other; None where nothing changes."""
    for unit in itertools.product(*(range(clean.shape[axis]) for axis in units)):
        chosen = [slice(None)] * clean.ndim
        for axis, index in zip(units, unit, strict=True):
            chosen[axis] = slice(index, index + 1)
        patched = corrupt.clone()
        patched[tuple(chosen)] = clean[tuple(chosen)]
        yield None if torch.equal(patched, corrupt) else patched
