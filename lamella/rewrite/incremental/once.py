"""What depends on no token of the sequence that grows, as a graph of its own: the encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import IncrementalError
from lamella.ir.graph import Graph
from lamella.ir.signature import Signature
from lamella.ir.symbols import shape_of, size_of
from lamella.ir.torch_private import tree_flatten
from lamella.rewrite.incremental.build import Builder
from lamella.rewrite.incremental.roles import Role

aten = torch.ops.aten


@dataclass(frozen=True)
class Split:
    """A model in two graphs.

    Attributes:
        once: Computes `names` (first) and those outputs of the model that no token changes.
        names: Inputs of the other graph.
        kept: Indices of the outputs of the model that `once` computes.
    """

    once: Graph | None
    names: tuple[str, ...] = ()
    kept: tuple[int, ...] = ()


def split_once(builder: Builder, whole: Graph) -> Split:
    """Cut what runs once off the graph of `builder`, which reads its results as inputs.

    Args:
        builder: At its beginning.
        whole: The graph that it started from; becomes the graph of what runs once.

    Raises:
        IncrementalError: A size of the encoder is needed that none of its results has.
    """
    computed = _computed_once(builder)
    if not computed:
        return Split(None)
    boundary = [node for node in computed if _read_later(builder, node)]
    names = _names(builder, boundary)
    once, kept = _once(whole, [node.name for node in boundary], names, computed)
    inputs = [_as_input(builder, node, name) for node, name in zip(boundary, names, strict=True)]
    _measure_elsewhere(builder, set(computed), [builder.tokens, *inputs])
    return Split(once, names, kept)


def _computed_once(builder: Builder) -> list[Node]:
    """Tensors that depend on inputs, but on no token of the sequence that grows."""
    found: dict[Node, None] = {}
    for node in builder.graph.nodes:
        if builder.roles.get(node) is not Role.ONCE:
            continue
        reads = any(source in found for source in node.all_input_nodes)
        if node.op == "placeholder" or reads:
            found[node] = None
    return list(found)


def _read_later(builder: Builder, node: Node) -> bool:
    if not isinstance(node.meta.get("val"), Tensor):
        return False
    later = (Role.NEW, Role.LENGTH)
    return any(builder.roles.get(user) in later for user in node.users)


def _names(builder: Builder, boundary: list[Node]) -> tuple[str, ...]:
    """``cross.0.key``, …: what attention reads is called by what it is, the rest is numbered."""
    reads: dict[Node, str] = {}
    layer = 0
    for node in builder.graph.find(aten.scaled_dot_product_attention.default):
        if builder.roles[node] is not Role.NEW:
            continue
        key, value = node.args[1:3]
        if key in boundary and value in boundary:
            reads.setdefault(key, f"cross.{layer}.key")  # pyright: ignore[reportArgumentType]
            reads.setdefault(value, f"cross.{layer}.value")  # pyright: ignore[reportArgumentType]
            layer += 1
    return tuple(reads.get(node, f"once.{i}") for i, node in enumerate(boundary))


def _once(
    graph: Graph, boundary: list[str], names: tuple[str, ...], computed: list[Node]
) -> tuple[Graph, tuple[int, ...]]:
    """The graph of what runs once, and which outputs of the model it gives."""
    alike = {node.name: node for node in graph.nodes}
    inside = {node.name for node in computed}
    outputs = list(enumerate(zip(graph.outputs, graph.signature.outputs, strict=True)))
    kept = [(i, o, n) for i, (o, n) in outputs if isinstance(o, Node) and o.name in inside]
    results = [alike[name] for name in boundary] + [output for _, output, _ in kept]
    labels = (*names, *(name for *_, name in kept))
    graph.set_outputs(results, flat_signature(graph.signature.inputs, labels))
    graph.finish()
    for name, node in list(zip(graph.signature.inputs, graph.inputs, strict=True)):
        if not node.users:
            rest = tuple(n for n in graph.signature.inputs if n != name)
            graph.remove_input(node, flat_signature(rest, labels))
    return graph, tuple(i for i, *_ in kept)


def _as_input(builder: Builder, node: Node, name: str) -> Node:
    given = builder.graph.add_input(name.replace(".", "_"), node.meta["val"])
    for user in list(node.users):
        if user.op != "output":
            builder.graph.reread(user, node, given)
    builder.remember(given, Role.ONCE)
    builder.once_names[given] = name
    return given


def _measure_elsewhere(builder: Builder, computed: set[Node], inputs: list[Node]) -> None:
    """Measure the sizes of what is gone on what is there."""
    graph = builder.graph
    homes: dict[Any, tuple[Node, int]] = {}
    for node in inputs:
        for axis, size in enumerate(shape_of(node)):
            homes.setdefault(size, (node, axis))
    for node in graph.find(aten.sym_size.int):
        if node.args[0] not in computed or node.args[0] in inputs:
            continue
        size = size_of(node.meta["val"])
        if size not in homes:
            readers = [user for user in node.users if builder.roles.get(user) is not Role.ONCE]
            if readers:
                raise IncrementalError(
                    f"{readers[0].name} needs the size {size} of {node.args[0]}, which nothing "
                    f"that the encoder gives to the decoder has"
                )
            continue
        graph.replace(node, graph.call(aten.sym_size.int, *homes[size], after=graph.inputs[-1]))


def flat_signature(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Signature:
    """The signature of a graph called with one keyword for each input, giving a dict."""
    _, in_spec = tree_flatten(((), dict.fromkeys(inputs, 0)))
    _, out_spec = tree_flatten(dict.fromkeys(outputs, 0))
    return Signature(inputs, outputs, in_spec, out_spec)
