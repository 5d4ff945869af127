"""NaN and infinities in a forward: the first operation that made them is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from lamella.errors import GraphError
from lamella.ir.graph import Graph
from lamella.ir.ops import op_name


def check_finite(found: Mapping[str, Tensor], graph: Graph, given: Mapping[str, Any]) -> None:
    """Refuse results that are not finite.

    Args:
        found: What a relevance graph gave.
        graph: The graph of the model.
        given: Its inputs, in order.

    Raises:
        GraphError: Outputs of the model or their relevance hold NaN or infinities; the message
            names the first operation of the model that gave NaN, if one did.
    """
    wrong = [
        name
        for name, value in found.items()
        if value.is_floating_point() and bool(value.isnan().any())
    ]
    if not wrong:
        return
    first = _Watch(graph.module).first(list(given.values()))
    if first is not None:
        raise GraphError(
            f"the model computes NaN, first in {first.name} ({op_name(first.target)}); look at "
            f"its inputs, or run it in float32"
        )
    raise GraphError(
        f"the relevance of {', '.join(wrong)} is NaN though the model computes none: numbers "
        f"overflow on the way back; run the model in float32"
    )


class _Watch(fx.Interpreter):
    """Runs a graph and remembers the first operation that gave NaN from numbers."""

    def first(self, values: list[Any]) -> Node | None:
        """The first such operation, or None."""
        self.found: Node | None = None
        with torch.no_grad():
            self.run(*values)
        return self.found

    def run_node(self, n: Node) -> Any:
        """Run a node, and look at what it gave."""
        value = super().run_node(n)
        parts: Any = value if isinstance(value, tuple | list) else (value,)
        if self.found is None and any(map(_has_nan, parts)):
            self.found = n
        return value


def _has_nan(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())
