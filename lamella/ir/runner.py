"""Statistics of the values of a graph: all that is asked for in one run of the samples.

The samples run segment by segment along the residual stream (see `lamella.ir.segments`): the
weights of a block are read once for all samples, and a value is freed after its last reader.

Padding: if the model has an attention mask (an input ``[batch, sequence]`` whose name ends with
``attention_mask``), masked tokens count nowhere. The tokens of a value are recognized by its
shape: a value whose first two axes have the symbolic sizes of the mask, or whose first axis is
their product (rows of experts), has one row per token. Any other value (heads before they are
joined, images) is taken whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor
from torch.fx import Node

from lamella.errors import GraphError, SamplesError, closest
from lamella.ir.axes import merged_batch, sizes_with
from lamella.ir.graph import Graph
from lamella.ir.reducers import Reducer, State
from lamella.ir.segments import Program, Values, program
from lamella.ir.symbols import shape_of

Progress = Callable[[int, int], None]
Samples = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """A statistic of one value of a graph, or of several values of the same tokens.

    Attributes:
        nodes: Names of the nodes, as many as the reducer reads.
        reducer: What to keep.
        channel_axis: The axis of the channels: the last, or 1 for images.
        masked: Whether padding is left out.
    """

    nodes: tuple[str, ...]
    reducer: Reducer
    channel_axis: int = -1
    masked: bool = True

    def __post_init__(self) -> None:
        if len(self.nodes) != self.reducer.arity:
            raise ValueError(
                f"{type(self.reducer).__name__} reads {self.reducer.arity} values, "
                f"got {len(self.nodes)}"
            )

    @classmethod
    def of(cls, reducer: Reducer, *nodes: Node | str, channel_axis: int = -1) -> Request:
        """A request for nodes given as such or by name."""
        names = tuple(node if isinstance(node, str) else node.name for node in nodes)
        return cls(names, reducer, channel_axis)


def run_requests(
    graph: Graph,
    samples: Samples,
    requests: Iterable[Request],
    *,
    progress: Progress | None = None,
) -> Mapping[Request, Tensor]:
    """The statistics that are asked for, over all samples.

    Args:
        graph: A canonical graph.
        samples: Inputs of the model, one mapping per batch; how they are cut into batches makes
            no difference beyond rounding.
        requests: Equal requests are computed once.
        progress: Called with the number of segments done and their count.

    Raises:
        GraphError: A request names a node that the graph doesn't have, or a weight.
        SamplesError: A sample doesn't fit, there is none, or all tokens are masked.
    """
    results: dict[Request, Tensor] = {}
    for finished in sweep_requests(graph, samples, requests, progress=progress):
        results.update(finished)
    return results


def sweep_requests(
    graph: Graph,
    samples: Samples,
    requests: Iterable[Request],
    *,
    progress: Progress | None = None,
) -> Iterator[Mapping[Request, Tensor]]:
    """As `run_requests`, but yields the statistics of each segment when it is done.

    What a caller forgets is freed: large statistics (Gram matrices) need memory for one block.
    """
    wanted = list(dict.fromkeys(requests))
    if not wanted:
        return
    taps = _taps(graph, wanted)
    running = program(graph, _masks(graph).values(), together=[tap.nodes for tap in taps])
    states = [running.start(sample) for sample in samples]
    if not states:
        raise SamplesError("there are no samples; give at least one input dict")
    by_last = _by_last_node(graph, taps)

    def watch(node: Node, values: Values) -> None:
        for tap in by_last.get(node, ()):
            tap.see(values)

    for values in states:
        for node in graph.inputs:
            watch(node, values)
    yield _results(by_last, graph.inputs)
    for done, segment in enumerate(running.sweep(states, watch), start=1):
        if progress is not None:
            progress(done, len(running.segments))
        yield _results(by_last, segment.nodes)


def _results(by_last: dict[Node, list[_Tap]], nodes: Iterable[Node]) -> dict[Request, Tensor]:
    """The statistics that are complete after `nodes`, which are forgotten here."""
    return {tap.request: tap.result() for node in nodes for tap in by_last.pop(node, ())}


def run_outputs(graph: Graph, samples: Samples) -> list[tuple[Any, ...]]:
    """The flat outputs for each sample; weights that are not in memory are read once.

    Raises:
        SamplesError: A sample doesn't fit the model.
    """
    outputs = graph.outputs
    running = program(graph, [node for node in outputs if isinstance(node, Node)])
    states = [running.start(sample) for sample in samples]
    for _ in running.sweep(states):
        pass
    return [tuple(_output(running, node, values) for node in outputs) for values in states]


def token_mask(graph: Graph, node: Node) -> Node | None:
    """The attention mask whose tokens the rows of `node` are, or None (see the module)."""
    return _mask_of(node, _masks(graph), merged_batch(graph))


def _output(running: Program, node: Any, values: Values) -> Any:
    if isinstance(node, Node) and node.op == "get_attr":
        return running.graph.weight(node)
    return values[node] if isinstance(node, Node) else node


@dataclass
class _Tap:
    """A request while the samples run."""

    request: Request
    nodes: tuple[Node, ...]
    mask: Node | None
    state: State | None = None
    tokens: int = 0

    def see(self, values: Values) -> None:
        mask = None if self.mask is None else values[self.mask].bool().flatten()
        rows = [token_rows(values[node], self.request.channel_axis, mask) for node in self.nodes]
        self.tokens += rows[0].shape[0]
        self.state = self.request.reducer.add(self.state, *rows)

    def result(self) -> Tensor:
        if self.state is None or self.tokens == 0:
            raise SamplesError(
                f"the samples hold no token for {', '.join(self.request.nodes)}: "
                f"every token is masked"
            )
        return self.request.reducer.result(self.state)


def token_rows(value: Tensor, channel_axis: int, mask: Tensor | None) -> Tensor:
    """`value` as ``[tokens, channels]`` without the masked tokens.

    Args:
        value: Of a node.
        channel_axis: The axis of the channels.
        mask: bool ``[batch * sequence]``; None keeps all rows.
    """
    if value.ndim == 0:
        return value.reshape(1, 1)
    moved = value.movedim(channel_axis, -1)
    if mask is None:
        return moved.reshape(-1, moved.shape[-1])
    # One row per token and per axis between the tokens and the channels (heads).
    return moved.reshape(mask.shape[0], -1, moved.shape[-1])[mask].flatten(0, 1)


def _taps(graph: Graph, requests: Sequence[Request]) -> list[_Tap]:
    known = {node.name: node for node in graph.nodes if node.op != "output"}
    masks, merged = _masks(graph), merged_batch(graph)
    taps: list[_Tap] = []
    for request in requests:
        nodes = tuple(_known(known, name) for name in request.nodes)
        mask = _mask_of(nodes[0], masks, merged) if request.masked else None
        if request.channel_axis not in (-1, nodes[0].meta["val"].ndim - 1):
            mask = None
        taps.append(_Tap(request, nodes, mask))
    return taps


def _known(known: Mapping[str, Node], name: str) -> Node:
    if name not in known:
        raise GraphError(f"the graph has no node called {name!r}{closest(name, known)}")
    node = known[name]
    if node.op == "get_attr" or not isinstance(node.meta.get("val"), Tensor):
        raise GraphError(f"{name} is not an activation; statistics are taken of activations")
    return node


def _by_last_node(graph: Graph, taps: Iterable[_Tap]) -> dict[Node, list[_Tap]]:
    order = {node: place for place, node in enumerate(graph.nodes)}
    found: dict[Node, list[_Tap]] = {}
    for tap in taps:
        found.setdefault(max(tap.nodes, key=order.__getitem__), []).append(tap)
    return found


def _masks(graph: Graph) -> dict[str, Node]:
    """The attention masks among the inputs, by name; the plain ``attention_mask`` comes first."""
    found = [
        (name, node)
        for name, node in zip(graph.signature.inputs, graph.inputs, strict=True)
        if name.endswith("attention_mask") and len(shape_of(node)) == 2
    ]
    return dict(sorted(found, key=lambda pair: pair[0] != "attention_mask"))


def _mask_of(
    node: Node,
    masks: Mapping[str, Node],
    merged: Mapping[sympy.Symbol, sympy.Symbol],
) -> Node | None:
    sizes = sizes_with(node, merged)
    for mask in masks.values():
        batch, sequence = sizes_with(mask, merged)
        if sizes[:2] == (batch, sequence) and len(sizes) > 2:
            return mask
        if len(sizes) == 2 and sizes[0] == batch * sequence:
            return mask
    return None


__all__ = [
    "Request",
    "run_outputs",
    "run_requests",
    "sweep_requests",
    "token_mask",
    "token_rows",
]
