"""Linear layers that read the same value, written as one product.

One token at a time, a product is done as fast as its weights are read; starting it costs about
as much as reading a few hundred kilobytes. Queries, keys and values in one product are also what
`GroupQueryAttention` takes as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.weights import stored
from lamella.ir import ops

aten = torch.ops.aten
lam = torch.ops.lamella

_WEIGHTS: Mapping[Any, tuple[str, ...]] = {
    aten.linear.default: ("weight", "bias"),
    lam.linear_nbits.default: ("packed", "scales", "zero_points", "bias"),
}


def plan(e: Emission, emitters: Mapping[Callable[..., Any], Emitter]) -> dict[Node, Emitter]:
    """The linear layers of a decoder that can be merged with others."""
    if e.graph.cache is None or not e.options.contrib:
        return {}
    found: dict[Node, Emitter] = {}
    for group in _groups(e):
        emit = _once(group, emitters)
        found |= dict.fromkeys(group, emit)
    return found


def _groups(e: Emission) -> Iterator[list[Node]]:
    by_form: dict[Any, list[Node]] = {}
    for node in e.graph.nodes:
        form = _form(node) if node.target in _WEIGHTS else None
        if form is not None:
            by_form.setdefault(form, []).append(node)
    yield from (group for group in by_form.values() if len(group) > 1)


def _form(node: Node) -> tuple[Any, ...] | None:
    """What layers must agree in; None for one that can't be merged."""
    bound = ops.bind(node)
    parts: list[Any] = [node.target, bound["input"]]
    for name in _WEIGHTS[node.target]:
        weight = bound[name]
        if weight is not None and (weight.op != "get_attr" or len(weight.users) != 1):
            return None
        parts.append(None if weight is None else weight.meta["val"].dtype)
    settings = ("bits", "block", "int8_activations")
    return (*parts, *(bound[name] for name in settings if name in bound))


def _once(group: Sequence[Node], emitters: Mapping[Callable[..., Any], Emitter]) -> Emitter:
    """Writes the product when the first layer of the group is met, a part for each layer."""
    parts: dict[Node, ir.Value] = {}

    def emit(e: Emission, call: Call) -> ir.Value:
        if not parts:
            first = Call.of(group[0])
            merged = {name: _joined(e, group, name) for name in _WEIGHTS[first.node.target]}
            target = first.node.target
            assert not isinstance(target, str)
            product = emitters[target](e, _with_weights(first, merged))
            assert isinstance(product, ir.Value)
            sizes = e.ints(*(int(node.meta["val"].shape[-1]) for node in group))
            cuts = e.add("Split", (product, sizes), {"axis": -1}, outputs=len(group))
            parts.update(zip(group, cuts, strict=True))
        return parts[call.node]

    return emit


def _joined(e: Emission, group: Sequence[Node], name: str) -> Node | None:
    """A node that stands for the weights `name` of all layers, one below the other."""
    weights = [ops.bind(node)[name] for node in group]
    if weights[0] is None:
        return None
    title, held = f"{weights[0].target}.merged", weights[0].meta["val"]
    shape = (sum(int(w.meta["val"].shape[0]) for w in weights), *map(int, held.shape[1:]))
    joined = torch.fx.Graph().get_attr(title)
    joined.meta["val"] = torch.empty(shape, dtype=held.dtype, device="meta")
    read = lambda: torch.cat([e.graph.weight(w) for w in weights])  # noqa: E731
    if name == "weight":
        turned = lambda: read().t()  # noqa: E731
        e.views[joined, "transposed"] = stored(e, title, turned, shape[::-1], held.dtype)
    else:
        e.values[joined] = stored(e, title, read, shape, held.dtype)
    return joined


def _with_weights(call: Call, weights: Mapping[str, Node | None]) -> Call:
    return dataclasses.replace(call, arguments={**call.arguments, **weights})
