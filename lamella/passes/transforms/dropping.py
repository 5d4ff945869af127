"""Take parts off the residual stream so that nothing of them is left to compute.

`lamella.ir.bypass` lets the stream run past a part. What is done here is the rest: outputs that
only the part computes leave the output, sizes that were read off its values are read elsewhere,
and the checkpoint writer is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from torch import SymInt, Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.bypass import bypass
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.signature import Signature
from lamella.ir.stream import Sublayer
from lamella.ir.torch_private import tree_flatten
from lamella.passes.base import Analyses

_GONE = object()


def drop(graph: Graph, analyses: Analyses, parts: Sequence[Sublayer], names: Sequence[str]) -> None:
    """Drop `parts`, and finish the graph.

    Args:
        graph: Is edited; its stream is found again afterwards.
        analyses: Takes the remarks.
        parts: Sublayers of ``graph.stream``.
        names: What to record as dropped: the parts, or the blocks they are.
    """
    if not parts:
        return
    inside = frozenset(node for part in parts for node in part.nodes)
    bypass(graph, parts)
    _read_sizes_elsewhere(graph, inside)
    _drop_outputs(graph, inside, analyses)
    graph.origin = dataclasses.replace(graph.origin, dropped=(*graph.origin.dropped, *names))
    graph.finish()
    left = set(graph.nodes)
    working = [
        node
        for node in inside & left
        if (facts := ops.facts(node.target)) and facts.category in ("contraction", "attention")
    ]
    if working:
        listed = ", ".join(sorted(node.name for node in working))
        analyses.remark(f"{listed} still run: something outside of what was dropped reads them")


def _read_sizes_elsewhere(graph: Graph, inside: frozenset[Node]) -> None:
    """Let `sym_size` of a value inside read the same size off an input or the stream."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for size in graph.find(aten.sym_size.int):
        source = size.all_input_nodes[0]
        outside = any(user not in inside for user in size.users)
        if source not in inside or not outside:
            continue
        for value, axis in _same_size(graph, size):
            if value not in inside and order[value] < order[size]:
                graph.set_operand(size, "self", value)
                graph.set_operand(size, "dim", axis)
                break


def _same_size(graph: Graph, size: Node) -> list[tuple[Node, int]]:
    """Values and axes that have the size `size`: inputs first, then what else there is."""
    wanted = _expression(size.meta["val"])
    values = [*graph.inputs, *(node for node in graph.nodes if node.op == "call_function")]
    return [
        (value, axis)
        for value in values
        if isinstance(fake := value.meta.get("val"), Tensor)
        for axis, extent in enumerate(fake.shape)
        if _expression(extent) == wanted
    ]


def _expression(size: Any) -> object:
    return size.node.expr if isinstance(size, SymInt) else size


def _drop_outputs(graph: Graph, inside: frozenset[Node], analyses: Analyses) -> None:
    """Take outputs that only dropped parts compute (attention maps) out of the output tree."""
    outputs = graph.outputs
    gone = [place for place, value in enumerate(outputs) if value in inside]
    if not gone:
        return
    signature = graph.signature
    leaves: list[Any] = [_GONE if place in gone else place for place in range(len(outputs))]
    tree = _without(signature.unflatten(leaves))
    if tree is _GONE:
        analyses.remark("every output belongs to what was dropped; they are kept")
        return
    places, spec = tree_flatten(tree)
    names = tuple(signature.outputs[place] for place in places)
    listed = ", ".join(signature.outputs[place] for place in gone)
    analyses.note(f"outputs that are gone with what computed them: {listed}")
    graph.set_outputs(
        [outputs[place] for place in places],
        Signature(signature.inputs, names, signature.in_spec, spec),
    )


def _without(tree: Any) -> Any:
    """`tree` without the leaves that are gone; a container that is empty then goes too."""
    if isinstance(tree, dict):
        pairs = cast(dict[Any, Any], tree).items()
        kept = {key: new for key, item in pairs if (new := _without(item)) is not _GONE}
        return type(tree)(**kept) if kept else _GONE
    if isinstance(tree, tuple | list):
        items = [new for item in cast(Sequence[Any], tree) if (new := _without(item)) is not _GONE]
        return type(tree)(items) if items or not tree else _GONE
    return tree
