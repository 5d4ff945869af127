"""What a decoder keeps of every attention: keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.causality import Causality
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.rules.work import Call, Expr

_VIEWS = frozenset(
    {
        *(aten.reshape.default, aten.transpose.int, aten.permute.default),
        *(aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default),
    }
)
_OF_SCORES = frozenset(
    {
        *(aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default),
        *(aten.where.self, aten.masked_fill.Scalar, aten.to.dtype, aten.where.ScalarOther),
    }
)


@dataclass(frozen=True)
class Kept:
    """What a causal self-attention keeps for later tokens.

    Attributes:
        node: The node that weighs values.
        key: Keys as it reads them.
        value: Values, likewise.
    """

    node: Node
    key: Node
    value: Node


def kept_of(graph: Graph) -> Iterator[Kept]:
    """What every causal self-attention keeps.

    An attention is an SDPA, or a product of a softmax with values.
    """
    causality = Causality(graph)
    for node, key, value, masks, causal in _attentions(graph):
        if causal or any(causality.hides_future(mask) for mask in masks):
            yield Kept(node, key, value)


def caches_of(graph: Graph, names: Mapping[sympy.Symbol, sympy.Symbol]) -> dict[Node, Expr]:
    """Bytes of keys and values of each causal self-attention, by the node that weighs values.

    Heads that are repeated for grouped queries count once, and what is rounded to so many bits
    where it is read counts as so many bits.
    """
    return {
        kept.node: _least_bytes(kept.key, names) + _least_bytes(kept.value, names)
        for kept in kept_of(graph)
    }


def _attentions(graph: Graph) -> Iterator[tuple[Node, Any, Any, list[Any], bool]]:
    """The node, its keys, values and possible masks, and whether it says that it is causal."""
    for node in graph.find(aten.scaled_dot_product_attention.default):
        bound = ops.bind(node)
        yield node, bound["key"], bound["value"], [bound["attn_mask"]], bool(bound["is_causal"])
    for node in graph.find(aten.matmul.default):
        weights, value = node.args[:2]
        softmax = _through(weights, frozenset({aten.to.dtype, *_VIEWS}))
        if softmax.target is aten.softmax.int and isinstance(value, Node):
            scores, masks = _scores(softmax.args[0])
            if scores is not None:
                yield node, scores.args[1], value, masks, False


def _scores(node: Any) -> tuple[Node | None, list[Node]]:
    """The product of queries and keys that a softmax reads, and what is mixed in on the way."""
    mixed: list[Node] = []
    while isinstance(node, Node) and node.target is not aten.matmul.default:
        if node.target not in _OF_SCORES | _VIEWS:
            return None, mixed
        main, *others = sorted(node.all_input_nodes, key=_depends_on_product, reverse=True)
        mixed += others
        node = main
    return (node, mixed) if isinstance(node, Node) else (None, mixed)


def _depends_on_product(node: Node) -> bool:
    """Whether a product of matrices is a few steps before `node`."""
    for _ in range(8):
        if node.target is aten.matmul.default:
            return True
        if node.target not in _OF_SCORES | _VIEWS or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


def _through(node: Any, views: frozenset[Any]) -> Any:
    while isinstance(node, Node) and node.target in views:
        node = node.args[0]
    return node


def _least_bytes(node: Any, names: Mapping[sympy.Symbol, sympy.Symbol]) -> Expr:
    """Bytes of a value before its heads were repeated."""
    call = Call(node, names)
    least = call.written_bytes()
    if node.target is lam.round_uniform.default:
        return least * ops.bind(node)["bits"] / (8 * node.meta["val"].dtype.itemsize)
    while isinstance(node, Node) and node.target in _VIEWS:
        node = node.args[0]
        size = Call(node, names).written_bytes()
        least = size if (least / size).is_integer and size != least else least
    return least
