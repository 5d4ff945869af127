"""Logits of the tokens that are wanted: the others are left out before the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from lamella.backends.onnxruntime.counts import ROWS
from lamella.backends.onnxruntime.emission import Caches, Call, Emission, Emitter
from lamella.ir import ops

aten = torch.ops.aten
lam = torch.ops.lamella

_HEADS = frozenset({aten.linear.default, lam.linear_nbits.default})


def plan(e: Emission, emitters: Mapping[Callable[..., Any], Emitter]) -> dict[Node, Emitter]:
    """The head, or what gives the logits when no head is found."""
    layout = e.graph.cache
    if e.options.caches is Caches.PLAIN or layout is None:
        return {}
    place = e.graph.signature.outputs.index(layout.logits)
    logits = e.graph.outputs[place]
    assert isinstance(logits, Node)
    head = _head_of(logits)
    if head is not None:
        return {head: _of_rows(emitters[head.target])}  # pyright: ignore[reportArgumentType]
    return {logits: _then_rows(emitters[logits.target])}  # pyright: ignore[reportArgumentType]


def _head_of(node: Node) -> Node | None:
    """The last linear layer, when only operations on each number alone follow it."""
    while node.target not in _HEADS:
        facts = ops.facts(node.target)
        if facts is None or facts.category not in ("elementwise", "activation"):
            return None
        tensors = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
        # What is added or multiplied must not have rows of its own.
        wide = [x for x in tensors if x.meta["val"].ndim > 1]
        if len(wide) != 1 or len(wide[0].users) != 1:
            return None
        node = wide[0]
    return node if ops.bind(node)["input"].meta["val"].ndim == 3 else None


def _of_rows(emitter: Emitter) -> Emitter:
    def emit(e: Emission, call: Call) -> Any:
        source = call["input"]
        whole = e.tensor(source)
        e.values[source] = _picked(e, whole)
        result = emitter(e, call)
        e.values[source] = whole
        return result

    return emit


def _then_rows(emitter: Emitter) -> Emitter:
    def emit(e: Emission, call: Call) -> Any:
        result = emitter(e, call)
        assert isinstance(result, ir.Value)
        return _picked(e, result)

    return emit


def _picked(e: Emission, x: ir.Value) -> ir.Value:
    """``[batch, new, features]`` -> ``[batch, wanted, features]``."""
    return e.op("GatherND", x, e.counts[ROWS], batch_dims=1)
