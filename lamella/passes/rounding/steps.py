"""A graph cut into what runs before each group of weights that read one value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.runner import token_mask
from lamella.ir.segments import Program, Segment, program
from lamella.passes.sites import Site


@dataclass(frozen=True)
class Group:
    """Weights of a block that linear layers multiply one value with.

    Attributes:
        value: What they read; None if they are rounded without looking at their inputs.
        mask: The attention mask of its tokens, or None.
        sites: The weights.
        reason: Why the inputs are not looked at, or None.
    """

    value: Node | None
    mask: Node | None
    sites: tuple[Site, ...]
    reason: str | None = None


@dataclass(frozen=True)
class Step:
    """What runs for every sample, and the group whose inputs are there then."""

    piece: Segment
    group: Group


@dataclass(frozen=True)
class Stage:
    """A block: its steps, and what runs after the last of them.

    Attributes:
        segment: All of it.
        steps: In topological order.
        rest: What is left of the segment after the last step.
    """

    segment: Segment
    steps: tuple[Step, ...]
    rest: Segment

    @property
    def sites(self) -> tuple[Site, ...]:
        """The weights of all steps."""
        return tuple(site for step in self.steps for site in step.group.sites)


@dataclass(frozen=True)
class Stages:
    """A program and its blocks."""

    program: Program
    stages: tuple[Stage, ...]


def stages_of(graph: Graph, sites: Iterable[Site]) -> Stages:
    """Cut what the readers of `sites` need, behind every block and before every group.

    Masks stay alive to the end; any other value is freed behind its last reader.
    """
    sites = tuple(sites)
    site_of = {reader: site for site in sites for reader in site.readers}
    linears = [reader for reader in site_of if reader.target is aten.linear.default]
    masks = {reader: token_mask(graph, reader.all_input_nodes[0]) for reader in linears}
    kept = [mask for mask in masks.values() if mask is not None]
    running = program(graph, kept, together=[(reader,) for reader in site_of])
    seen: set[str] = set()
    stages = [_stage(segment, site_of, masks, seen) for segment in running.segments]
    return Stages(running, tuple(stages))


def _stage(
    segment: Segment,
    site_of: Mapping[Node, Site],
    masks: Mapping[Node, Node | None],
    seen: set[str],
) -> Stage:
    places: dict[Node | str, int] = {}
    members: dict[Node | str, list[Site]] = {}
    for place, node in enumerate(segment.nodes):
        site = site_of.get(node)
        if site is None or site.weight in seen:
            continue
        seen.add(site.weight)
        key = site.weight if _reason(site) else node.all_input_nodes[0]
        places.setdefault(key, place)
        members.setdefault(key, []).append(site)
    steps: list[Step] = []
    start = 0
    for key, stop in places.items():
        steps.append(Step(part_of(segment, start, stop), _group(members[key], masks)))
        start = stop
    return Stage(segment, tuple(steps), part_of(segment, start, len(segment.nodes)))


def part_of(segment: Segment, start: int, stop: int) -> Segment:
    """The nodes of a segment from `start` to `stop`."""
    nodes = segment.nodes[start:stop]
    reads = dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes)
    weights = tuple(node for node in reads if node.op == "get_attr")
    return Segment(nodes, segment.frees[start:stop], weights)


def _group(sites: list[Site], masks: Mapping[Node, Node | None]) -> Group:
    reason = _reason(sites[0])
    if reason is not None:
        return Group(None, None, tuple(sites), reason)
    reader = sites[0].readers[0]
    return Group(reader.all_input_nodes[0], masks[reader], tuple(sites))


def _reason(site: Site) -> str | None:
    """Why the inputs of a weight can't be looked at before it has to be rounded."""
    if site.role == "embedding":
        return "only embeddings read them"
    if any(reader.target is aten.embedding.default for reader in site.readers):
        return "an embedding reads them too"
    return "several layers read them" if len(site.readers) > 1 else None
