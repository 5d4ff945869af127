"""Running a graph in segments, so that memory is one segment and the values at a cut.

The nodes that are needed for some wanted values are cut behind the exit of every block of the
residual stream. A segment reads its weights once, runs for every sample, and hands over only
the values that a later segment reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from lamella.errors import GraphError
from lamella.ir.graph import Graph
from lamella.ir.ops import op_name

Values = dict[Node, Any]
Watch = Callable[[Node, Values], None]
Calls = Mapping[Node, Callable[..., Any]]


@dataclass(frozen=True)
class Segment:
    """Nodes that run together.

    Attributes:
        nodes: Calls in topological order.
        frees: For each of them, the values that nothing reads after it.
        weights: The nodes whose weights the calls read.
    """

    nodes: tuple[Node, ...]
    frees: tuple[tuple[Node, ...], ...]
    weights: tuple[Node, ...]

    def read_weights(self, graph: Graph) -> dict[Node, Tensor]:
        """The data of the weights of this segment."""
        return {node: graph.weight(node) for node in self.weights}

    def run(
        self,
        values: Values,
        weights: Mapping[Node, Tensor],
        watch: Watch | None = None,
        *,
        calls: Calls = MappingProxyType({}),
        gradients: bool = False,
    ) -> None:
        """Compute the nodes of the segment into `values`, and forget what was read last.

        Args:
            values: What is alive, by node; changed in place.
            weights: What `read_weights` gave; another value may stand for a weight.
            watch: Called after each node, while its operands are still alive.
            calls: What is called instead of the operator of a node, with its arguments.
            gradients: Whether to record for `backward`.
        """
        with torch.set_grad_enabled(gradients):
            for node, frees in zip(self.nodes, self.frees, strict=True):
                values[node] = _call(node, values, weights, calls)
                if watch is not None:
                    watch(node, values)
                for freed in frees:
                    values.pop(freed, None)


@dataclass(frozen=True)
class Program:
    """The segments that lead to some wanted values.

    Attributes:
        graph: The graph.
        segments: In the order in which they run.
        wanted: The values that are never freed.
    """

    graph: Graph
    segments: tuple[Segment, ...]
    wanted: frozenset[Node]

    def start(self, sample: Mapping[str, Any]) -> Values:
        """The values of the inputs for one sample.

        Raises:
            SamplesError: The sample doesn't fit the signature.
        """
        flat = self.graph.signature.flatten((), sample)
        return dict(zip(self.graph.inputs, flat, strict=True))

    def sweep(self, states: Sequence[Values], watch: Watch | None = None) -> Iterator[Segment]:
        """Run segment by segment, each for all samples; yields each segment when it is done.

        Args:
            states: The values of each sample, from `start`; changed in place.
            watch: Called after each node of each sample.
        """
        for segment in self.segments:
            weights = segment.read_weights(self.graph)
            for values in states:
                segment.run(values, weights, watch)
            del weights
            yield segment


def program(
    graph: Graph,
    wanted: Iterable[Node],
    *,
    together: Iterable[Sequence[Node]] = (),
) -> Program:
    """Cut what `wanted` needs into segments.

    Args:
        graph: The graph to run.
        wanted: Values that stay alive to the end.
        together: Groups of values that must be alive at the same time, when the last of the
            group is computed.
    """
    wanted = frozenset(node for node in wanted if node.op != "get_attr")
    groups = [tuple(group) for group in together]
    order = {node: place for place, node in enumerate(graph.nodes)}
    needed = _ancestors([*wanted, *(node for group in groups for node in group)])
    frees = _frees(order, needed, wanted, groups)
    segments = [_segment(nodes, frees) for nodes in _cut(graph, needed) if nodes]
    return Program(graph, tuple(segments), wanted)


def _ancestors(nodes: Iterable[Node]) -> set[Node]:
    """`nodes` and everything that they are computed from."""
    found: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _cut(graph: Graph, needed: set[Node]) -> list[list[Node]]:
    """The needed calls in topological order, cut behind every exit of a block."""
    exits = {block.exit for block in graph.blocks}
    pieces: list[list[Node]] = [[]]
    for node in graph.nodes:
        if node.op == "call_function" and node in needed:
            pieces[-1].append(node)
        if node in exits:
            pieces.append([])
    return pieces


def _frees(
    order: Mapping[Node, int],
    needed: set[Node],
    wanted: frozenset[Node],
    groups: Iterable[Sequence[Node]],
) -> dict[Node, list[Node]]:
    """For each call, the values that it is the last to read."""
    last: dict[Node, Node] = {node: node for node in needed if node.op == "call_function"}
    for node in sorted(needed, key=order.__getitem__):
        for operand in node.all_input_nodes:
            last[operand] = node
    for group in groups:
        final = max(group, key=order.__getitem__)
        for node in group:
            last[node] = max(last.get(node, final), final, key=order.__getitem__)
    frees: dict[Node, list[Node]] = {}
    for node, reader in last.items():
        if node.op != "get_attr" and node not in wanted:
            frees.setdefault(reader, []).append(node)
    return frees


def _segment(nodes: Sequence[Node], frees: Mapping[Node, Sequence[Node]]) -> Segment:
    reads = [operand for node in nodes for operand in node.all_input_nodes]
    weights = dict.fromkeys(node for node in reads if node.op == "get_attr")
    return Segment(
        tuple(nodes), tuple(tuple(frees.get(node, ())) for node in nodes), tuple(weights)
    )


def _call(node: Node, values: Values, weights: Mapping[Node, Tensor], calls: Calls) -> Any:
    def value_of(operand: Node) -> Any:
        return weights[operand] if operand.op == "get_attr" else values[operand]

    if node.op != "call_function" or isinstance(node.target, str):
        raise GraphError(f"{node.name} ({node.op}) can't run; the graph is not canonical")
    args: Any = map_arg(node.args, value_of)
    kwargs: Any = map_arg(node.kwargs, value_of)
    try:
        return calls.get(node, node.target)(*args, **kwargs)
    except Exception as error:
        error.add_note(f"while running {node.name} ({op_name(node.target)})")
        raise
