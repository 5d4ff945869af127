"""Numbers that nothing can be explained by: the first operation that made them is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from lamella.errors import GraphError, SamplesError
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, bind, op_name

_HIDING = frozenset(
    {
        *(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.full.default),
        *(aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    }
)
"""Operators that write infinities to hide something from a softmax."""


def check_entries(graph: Graph, given: Mapping[str, Any]) -> None:
    """Refuse integers that an embedding has no entry for.

    Args:
        graph: The graph of the model.
        given: Its inputs by name.

    Raises:
        SamplesError: An input holds such a number.
    """
    inputs = dict(zip(graph.inputs, given.items(), strict=True))
    for node in graph.find(aten.embedding.default):
        bound: dict[str, Any] = bind(node)
        if bound["indices"] not in inputs:
            continue
        name, value = inputs[bound["indices"]]
        count = int(bound["weight"].meta["val"].shape[0])
        if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < count:
            wrong = value[(value < 0) | (value >= count)].flatten()[0]
            raise SamplesError(
                f"input {name!r} holds {wrong}, and there are {count} entries for it"
            )


def check_finite(found: Mapping[str, Tensor], graph: Graph, given: Mapping[str, Any]) -> None:
    """Refuse results that are not finite.

    Args:
        found: What a relevance graph gave.
        graph: The graph of the model.
        given: Its inputs, in order.

    Raises:
        GraphError: Outputs of the model or their relevance hold NaN, or relevance is infinite;
            the message names the first operation of the model that gave such a number, if one
            did.
    """
    wrong = [name for name, value in found.items() if _is_wrong(name, value)]
    if not wrong:
        return
    watch = _Watch(graph.module)
    watch.watch(list(given.values()))
    if watch.first_nan is not None:
        raise GraphError(f"{_said(watch.first_nan, 'NaN', graph)}; {_ADVICE}")
    if watch.first_infinite is not None:
        raise GraphError(f"{_said(watch.first_infinite, 'infinite numbers', graph)}; {_ADVICE}")
    raise GraphError(
        f"the relevance of {', '.join(wrong)} is not finite though all the model computes is: "
        f"numbers overflow on the way back; run the model in float32"
    )


_ADVICE = "look at its inputs and weights, or run it in float32"


def _is_wrong(name: str, value: Tensor) -> bool:
    if not value.is_floating_point():
        return False
    # Outputs of the model may be infinite where they are masked.
    is_told = name == "start" or name.startswith(("relevance.", "tap."))
    return not bool(value.isfinite().all()) if is_told else bool(value.isnan().any())


def _said(node: Node, what: str, graph: Graph) -> str:
    if node.op == "get_attr":
        return f"weight {node.target!r} holds {what}"
    if node.op == "placeholder":
        name = dict(zip(graph.inputs, graph.signature.inputs, strict=True))[node]
        return f"input {name!r} holds {what}"
    return f"the model computes {what}, first in {node.name} ({op_name(node.target)})"


class _Watch(fx.Interpreter):
    """Runs a graph and remembers the first operations that gave NaN and infinities.

    Attributes:
        first_nan: The first with NaN, or None.
        first_infinite: The first with infinities from finite numbers that hide nothing, or None.
    """

    def watch(self, values: list[Any]) -> None:
        """Run."""
        self.first_nan: Node | None = None
        self.first_infinite: Node | None = None
        self._infinite: set[Node] = set()
        with torch.no_grad():
            self.run(*values)

    def run_node(self, n: Node) -> Any:
        """Run a node, and look at what it gave."""
        value = super().run_node(n)
        parts: Any = value if isinstance(value, tuple | list) else (value,)
        numbers = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
        if self.first_nan is None and any(bool(part.isnan().any()) for part in numbers):
            self.first_nan = n
        if n.op != "output" and any(bool(part.isinf().any()) for part in numbers):
            came = any(operand in self._infinite for operand in n.all_input_nodes)
            self._infinite.add(n)
            if self.first_infinite is None and not came and n.target not in _HIDING:
                self.first_infinite = n
        return value
