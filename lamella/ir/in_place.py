"""Running a graph with results written over values that nothing reads any more.

A graph has no operators that write into their operands: passes could not move such nodes. To
run it in PyTorch, a result of the shape of a dying operand can take over its memory, which
saves the time for getting new memory (on a CPU several times that of a sum) and the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.symbols import size_of

_OUT: Mapping[Any, Any] = {
    aten.add.Tensor: aten.add.out,
    aten.sub.Tensor: aten.sub.out,
    aten.mul.Tensor: aten.mul.out,
    aten.div.Tensor: aten.div.out,
    aten.abs.default: aten.abs.out,
    aten.sign.default: aten.sign.out,
    aten.sqrt.default: aten.sqrt.out,
    aten.rsqrt.default: aten.rsqrt.out,
    aten.exp.default: aten.exp.out,
    aten.erf.default: aten.erf.out,
    aten.tanh.default: aten.tanh.out,
    aten.sigmoid.default: aten.sigmoid.out,
    aten.relu.default: aten.relu.out,
    aten.gelu.default: aten.gelu.out,
    aten.silu.default: aten.silu.out,
    aten.clamp.default: aten.clamp.out,
    aten.where.self: aten.where.self_out,
    aten.threshold_backward.default: aten.threshold_backward.grad_input,
}
"""Elementwise operator -> the same with a place for the result."""

_PLACE: Mapping[Any, str] = {aten.threshold_backward.default: "grad_input"}

_NEW = frozenset(
    {
        *("elementwise", "contraction", "normalization", "softmax", "attention", "creation"),
        *("reduction", "indexing", "scan"),
    }
)
"""Categories of operators whose results are memory of their own."""


def in_place(graph: Graph) -> fx.GraphModule:
    """A module that computes what `graph` computes and shares its weights."""
    held = _Memory(graph)
    twin = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        copied = twin.node_copy(node, copies.__getitem__)
        copies[node] = copied
        given = held.taken_over(node)
        if given is not None:
            place = _PLACE.get(node.target, "out")
            copied.target = _OUT[node.target]
            copied.kwargs = {**copied.kwargs, place: copies[given]}
    return fx.GraphModule(graph.module, twin)


class _Memory:
    """Which values share memory, and until when it is read."""

    def __init__(self, graph: Graph) -> None:
        nodes = graph.nodes
        self.place = {node: place for place, node in enumerate(nodes)}
        self.until = {node: max(map(self.place.__getitem__, [node, *node.users])) for node in nodes}
        self.root: dict[Node, Node] = {}
        self.fixed: set[Node] = set()

    def taken_over(self, node: Node) -> Node | None:
        """The operand whose memory the result of `node` takes; nodes come in order."""
        found = next((one for one in self._offers(node) if self._is_free(one, node)), None)
        if found is not None:
            self._join(node, [found])
        elif not _is_new(node):
            self._join(node, [one for one in node.all_input_nodes if _is_memory(one)])
        else:
            self.root[node] = node
        if node.op != "call_function" or node.target is aten.expand.default:
            self.fixed.add(self.root[node])
        return found

    def _offers(self, node: Node) -> list[Node]:
        if node.target not in _OUT or not isinstance(node.meta["val"], Tensor):
            return []
        wanted = _described(node.meta["val"])
        return [
            one
            for one in node.all_input_nodes
            if isinstance(one.meta["val"], Tensor) and _described(one.meta["val"]) == wanted
        ]

    def _is_free(self, operand: Node, node: Node) -> bool:
        root = self.root[operand]
        alone = all(self.root[one] is not root or one is operand for one in node.all_input_nodes)
        return alone and root not in self.fixed and self.until[root] <= self.place[node]

    def _join(self, node: Node, others: list[Node]) -> None:
        """`node` and the memory of `others` are one from here on."""
        roots = list(dict.fromkeys(self.root[one] for one in others))
        root = roots[0] if roots else node
        for old in roots[1:]:
            self.root.update({n: root for n, held in self.root.items() if held is old})
            if old in self.fixed:
                self.fixed.add(root)
            self.until[root] = max(self.until[root], self.until[old])
        self.root[node] = root
        self.until[root] = max(self.until[root], self.until[node])


def _is_new(node: Node) -> bool:
    if node.op != "call_function":
        return node.op != "output"
    facts = ops.facts(node.target)
    is_known = facts is not None and facts.category in _NEW
    return (is_known and node.target is not aten.einsum.default) or not _is_memory(node)


def _is_memory(node: Node) -> bool:
    """Whether a node computes tensors, no size."""
    return isinstance(node.meta.get("val"), Tensor | tuple | list)


def _described(value: Tensor) -> Any:
    return value.dtype, value.device, tuple(map(size_of, value.shape))
