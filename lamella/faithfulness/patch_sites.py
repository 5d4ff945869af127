"""Where activations are patched: blocks, branches and heads, whole or place by place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from lamella.errors import GraphError, closest
from lamella.ir.graph import Graph
from lamella.passes.relevance.taps import head_taps

Cut = Literal["whole", "position"]
BLOCK, HEADS = "block", "heads"


@dataclass(frozen=True)
class PatchSite:
    """A value of a graph, and the parts of it that are patched one by one.

    Attributes:
        name: For people: ``"model.layers.3.attention"``.
        kind: ``"block"``, ``"attention"``, ``"mlp"``, …, ``"heads"``, or a word of your own.
        node: Name of the node that computes it; its first axis is the batch.
        units: The axes, other than the first, along which it is cut; each entry (each pair of
            entries of two axes, …) is patched for itself. Without any the value is patched whole.
    """

    name: str
    kind: str
    node: str
    units: tuple[int, ...] = ()


def patch_sites(
    graph: Graph, kinds: Iterable[str] = (BLOCK, "attention", "mlp"), *, cut: Cut = "position"
) -> tuple[PatchSite, ...]:
    """The outputs of blocks, of branches and of heads, in the order of the stream.

    Args:
        graph: A canonical graph.
        kinds: ``"block"`` for the stream behind each block, a kind of branches (``"attention"``,
            ``"mlp"``, ``"moe"``, ``"conv"``, …) for what they add to it, ``"heads"`` for what
            each head of an attention computes before its output projection.
        cut: ``"position"``: every token (every pixel of ``[batch, channels, height, width]``) is
            patched for itself; ``"whole"``: all places at once. Heads are always apart.

    Raises:
        GraphError: The graph has none of a kind; the message names those it has.
        ValueError: `cut` is another word.
    """
    if cut not in ("whole", "position"):
        raise ValueError(f"cut must be 'whole' or 'position', got {cut!r}")
    by_kind: dict[str, list[PatchSite]] = {}
    for site in _all_sites(graph, cut):
        by_kind.setdefault(site.kind, []).append(site)
    for kind in (kinds := tuple(kinds)):
        if kind not in by_kind:
            raise GraphError(
                f"the graph has no {kind!r} to patch{closest(kind, by_kind)}; it has "
                f"{', '.join(by_kind) or 'neither blocks nor heads'}"
            )
    return tuple(site for kind in dict.fromkeys(kinds) for site in by_kind[kind])


def _all_sites(graph: Graph, cut: Cut) -> Iterator[PatchSite]:
    places = cut == "position"
    for block in graph.blocks:
        yield PatchSite(block.name, BLOCK, block.exit.name, _places(block.exit) if places else ())
    for part in graph.stream.sublayers:
        units = _places(part.branch) if places else ()
        yield PatchSite(part.name, part.kind, part.branch.name, units)
    of_block = {node.name: block.name for block in graph.blocks for node in block.nodes}
    for tap in head_taps(graph):
        (node,) = tap.nodes
        name = f"{of_block[node]}.heads" if node in of_block else node
        yield PatchSite(name, HEADS, node, (1, 2) if places else (1,))


def _places(node: Node) -> tuple[int, ...]:
    """The axes of the places of ``[batch, tokens, width]`` or of images."""
    return {3: (1,), 4: (2, 3)}.get(node.meta["val"].ndim, ())
