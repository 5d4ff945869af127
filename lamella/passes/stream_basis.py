"""The values of a residual stream that can be written in another basis, and what touches them.

All values that are added to each other share a basis. Turning it leaves the function as it is if
every value is made by a layer or a table whose weight can turn with it, and read by one, or by an
`rms_norm`, which sees lengths only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.passes.channels import LAYERS, moves_rows

Use = Literal["rows", "columns"]
"""What of a weight turns: the outputs of a layer, or what it reads (for a table: its rows)."""


@dataclass
class Basis:
    """Values that share a basis.

    Attributes:
        width: Size of the last axis of all of them.
        values: The values.
        weights: Reader of a weight -> what of it turns, for layers, tables and constants.
        norms: The norms in between.
        obstacle: Why the basis can't turn, or nothing.
    """

    width: int
    values: set[Node] = field(default_factory=set)
    weights: dict[Node, set[Use]] = field(default_factory=dict)
    norms: list[Node] = field(default_factory=list)
    obstacle: str = ""


def find_bases(graph: Graph) -> tuple[Basis, ...]:
    """The bases of all streams with an `rms_norm`, those that can't turn among them."""
    found: list[Basis] = []
    seen: set[Node] = set()
    for norm in graph.find(aten.rms_norm.default):
        source = graph.operand(norm, "input")
        if source in seen or len(graph.operand(norm, "normalized_shape")) != 1:
            continue
        basis = _Finder(graph, source).basis
        seen |= basis.values
        # Norms of queries and keys see no stream: nothing is added there.
        if any(value.target is aten.add.Tensor for value in basis.values):
            found.append(basis)
    return tuple(found)


class _Finder:
    """Collects the values that must turn together, from one of them."""

    def __init__(self, graph: Graph, start: Node) -> None:
        self.graph = graph
        self.basis = Basis(int(start.meta["val"].shape[-1]))
        waiting = [start]
        while waiting:
            value = waiting.pop()
            if value not in self.basis.values:
                self.basis.values.add(value)
                waiting += self._made_of(value)
                for user in value.users:
                    waiting += self._read_by(user, value)
        self._check_weights()

    def _stop(self, reason: str) -> None:
        self.basis.obstacle = self.basis.obstacle or reason

    def _turn(self, node: Node, use: Use) -> None:
        self.basis.weights.setdefault(node, set()).add(use)

    def _made_of(self, value: Node) -> Iterator[Node]:
        """What has to turn so that `value` turns."""
        if value.op == "get_attr" or value.target is aten.embedding.default:
            self._turn(value, "columns")
        elif value.target in LAYERS:
            self._turn(value, "rows")
        elif value.target is aten.rms_norm.default:
            self.basis.norms.append(value)
            yield self.graph.operand(value, "input")
        elif value.op != "call_function":
            self._stop(f"it begins at the input {value.name}")
        else:
            sources = self._summands(value)
            if not sources:
                self._stop(f"made by {ops.op_name(value.target)}")
            yield from sources

    def _summands(self, value: Node) -> list[Node]:
        """The operands of a sum, of a product with one number a row, or of a move of rows."""
        operands = [n for n in value.args if isinstance(n, Node) and _is_tensor(n)]
        if value.target is aten.add.Tensor or value.target is aten.sub.Tensor:
            wide = [n for n in operands if n.meta["val"].ndim and self._is_wide(n)]
            return wide if len(wide) == len(value.args[:2]) else []
        if value.target in (aten.mul.Tensor, aten.div.Tensor):
            return self._scaled(value, operands)
        source = operands[0] if operands else None
        return [source] if source is not None and moves_rows(self.graph, value, source) else []

    def _scaled(self, value: Node, operands: list[Node]) -> list[Node]:
        """The operand of a product, or the dividend, if the other one has a number for each row."""
        narrow = [n for n in operands if n.meta["val"].ndim == 0 or n.meta["val"].shape[-1] == 1]
        wide = [n for n in operands if n not in narrow]
        divides = value.target is aten.div.Tensor and value.args[0] not in wide
        return wide if len(wide) == 1 and self._is_wide(wide[0]) and not divides else []

    def _is_wide(self, node: Node) -> bool:
        return str(node.meta["val"].shape[-1]) == str(self.basis.width)

    def _read_by(self, user: Node, value: Node) -> Iterator[Node]:
        """What turns because `value` does."""
        if user.op == "output":
            self._stop("an output shows it")
        elif not _is_tensor(user):
            return
        elif user.target in LAYERS and self.graph.operand(user, "input") is value:
            self._turn(user, "columns")
        elif user.target is aten.rms_norm.default or value in self._summands(user):
            yield user
        else:
            self._stop(f"read by {ops.op_name(user.target)}")

    def _check_weights(self) -> None:
        for node, uses in self.basis.weights.items():
            weight = node if node.op == "get_attr" else self.graph.operand(node, "weight")
            if weight.op != "get_attr":
                self._stop(f"the weight of {node.name} is computed")
            elif not self.graph.is_loaded(weight):
                self._stop(f"weight {weight.target} is not in memory")
            elif node.op != "get_attr":
                others = [u for u in weight.users if self.basis.weights.get(u) != uses]
                if others:
                    self._stop(f"weight {weight.target} is shared with {others[0].name}")
            elif any(user not in self.basis.values for user in node.users):
                self._stop(f"the constant {node.target} has other readers")


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
