"""Graphs that continue from a cache; `incremental` makes one from a graph of whole sequences."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.cache import Source
from lamella.ir.graph import Graph
from lamella.rewrite.incremental.attention import Site
from lamella.rewrite.incremental.build import Builder, attended
from lamella.rewrite.incremental.flat_heads import raise_flat_heads
from lamella.rewrite.incremental.kept import kept
from lamella.rewrite.incremental.once import Split, flat_signature, split_once
from lamella.rewrite.incremental.states import (
    Convolution,
    continue_convolution,
    continue_scan,
    convolutions_of,
    scans_of,
    state_shape,
)

lam = torch.ops.lamella

__all__ = ["Incremental", "incremental"]


@dataclass(frozen=True)
class Incremental:
    """A model in the form in which it generates.

    Attributes:
        step: Takes new tokens and the cache, gives the outputs for the new tokens and the cache
            after them; ``step.cache`` says which input and output is what.
        once: Computes the inputs ``step.cache.once`` from the inputs of an encoder; None without
            one.
        outputs: Where each flat output of the model comes from.
    """

    step: Graph
    once: Graph | None
    outputs: tuple[Source, ...]


def incremental(graph: Graph) -> Incremental:
    """The form of `graph` that continues from a cache; `graph` stays as it is.

    One graph serves the prompt, one new token, and several at once. Its outputs are those of
    `graph` that depend on the tokens, for the new tokens only, then the cache.

    Raises:
        IncrementalError: Some operation sees later tokens, or mixes tokens in a way that no rule
            covers.
    """
    step = graph.copy()
    with step.author("cache"):
        raise_flat_heads(step)
        builder = Builder(step)
        split = split_once(builder, graph.copy())
        places = _add_slots(builder)
        builder.add_positions()
        builder.measure()
        for site, past in places.attentions:
            _continue_attention(builder, site, past)
        for convolution, past in places.convolutions:
            continue_convolution(builder, convolution, past)
        for scan, past in places.scans:
            continue_scan(builder, scan, past)
        builder.meet()
        left = _finish(builder, split)
    return Incremental(step, split.once, _sources(graph, split, left))


@dataclass(frozen=True)
class _Places:
    """Where the past comes in, each with its slots."""

    attentions: list[tuple[Site, tuple[Node, Node]]]
    convolutions: list[tuple[Convolution, Node]]
    scans: list[tuple[Node, Node]]


def _add_slots(builder: Builder) -> _Places:
    """An input for every slot, numbered in the order of the graph."""
    order = {node: place for place, node in enumerate(builder.graph.nodes)}
    found: list[Site | Convolution | Node] = [
        *builder.sites,
        *convolutions_of(builder),
        *scans_of(builder),
    ]
    found.sort(key=lambda one: order[one if isinstance(one, Node) else one.node])
    places, layer, opened = _Places([], [], []), -1, False
    for one in found:
        # A recurrence belongs to the layer whose convolution came before it.
        layer += not (isinstance(one, Node) and opened)
        opened = isinstance(one, Convolution)
        _add_slot(builder, places, layer, one)
    return places


def _add_slot(
    builder: Builder, places: _Places, layer: int, one: Site | Convolution | Node
) -> None:
    if isinstance(one, Site):
        pair = zip(("key", "value"), (one.key, one.value), strict=True)
        key, value = (builder.new_slot(layer, k, *_growing(builder, r)) for k, r in pair)
        places.attentions.append((one, (key, value)))
    elif isinstance(one, Convolution):
        like = ops.bind(one.node)["input"].meta["val"]
        shape = [*like.shape[:2], one.kept]
        past = builder.new_slot(layer, "convolution", shape, like.dtype)
        places.convolutions.append((one, past))
    else:
        dtype = ops.bind(one)["input"].meta["val"].dtype
        past = builder.new_slot(layer, "scan", state_shape(one), dtype)
        places.scans.append((one, past))


def _growing(builder: Builder, rows: Node) -> tuple[list[Any], torch.dtype]:
    """Shape and dtype of the past of keys or values."""
    value = rows.meta["val"]
    return [*value.shape[:2], builder.past, value.shape[3]], kept(builder.graph, rows).dtype


def _continue_attention(builder: Builder, site: Site, past: tuple[Node, Node]) -> None:
    """Let an attention read the keys and values of the past before the new ones."""
    graph, node = builder.graph, site.node
    heard = attended(builder, site)
    key, value = kept(graph, site.key), kept(graph, site.value)
    parts = graph.call(
        lam.cached_attention.default,
        *(site.query, key.rows, value.rows, *past),
        builder.mask if heard.masked else None,
        heard.bias,
        site.scale,
        heard.window,
        site.softcap,
        key.scale,
        value.scale,
        before=node,
    )
    graph.replace(node, graph.call(operator.getitem, parts, 0, before=node))
    for place, slot in enumerate(past, start=1):
        builder.set_output(slot, graph.call(operator.getitem, parts, place, before=node))


def _finish(builder: Builder, split: Split) -> tuple[int, ...]:
    """Set outputs and names; gives the places of the outputs of the model that are left."""
    graph = builder.graph
    before = list(zip(graph.outputs, graph.signature.outputs, strict=True))
    gone = set(split.kept)
    left = [i for i, (o, _) in enumerate(before) if isinstance(o, Node) and i not in gone]
    presents = [(present, slot.output) for slot, _, present in builder.slots]
    outputs = [before[i] for i in left] + presents
    names = tuple(name for _, name in outputs)
    signature = flat_signature(builder.input_names(), names)
    graph.set_outputs([output for output, _ in outputs], signature)
    graph.finish()
    for node in graph.inputs:
        if not node.users and not builder.is_fixed_input(node):
            graph.remove_input(node, graph.signature)
    graph.set_outputs(graph.outputs, flat_signature(builder.input_names(), names))
    graph.cache = builder.layout(split.names)
    return tuple(left)


def _sources(graph: Graph, split: Split, left: tuple[int, ...]) -> tuple[Source, ...]:
    found: list[Source] = []
    for place, output in enumerate(graph.outputs):
        if place in split.kept:
            found.append(Source("once", len(split.names) + split.kept.index(place)))
        elif place in left:
            found.append(Source("step", left.index(place)))
        else:
            found.append(Source("constant", value=output))
    return tuple(found)
