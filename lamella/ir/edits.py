"""One edit of a graph, as a fact: what was done, where, by whom."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from lamella.ir import ops


@dataclass(frozen=True)
class Edit:
    """An edit of a graph.

    Attributes:
        number: The edit count of the graph after it.
        action: The method of `Graph` that did it: ``"call"``, ``"set_weight"``, …
        node: Name of the node it was done to, or nothing.
        operator: Operator or weight of that node, or nothing.
        author: The pass that did it.
    """

    number: int
    action: str
    node: str
    operator: str
    author: str

    @classmethod
    def of(cls, number: int, action: str, node: Node | None, author: str) -> Edit:
        """The edit `action` of `node`."""
        if node is None:
            return cls(number, action, "", "", author)
        return cls(number, action, node.name, ops.op_name(node.target), author)

    def __str__(self) -> str:
        where = f" of {self.node} ({self.operator})" if self.node else ""
        return f"{self.action}{where} by {self.author}"


class StopEditing(BaseException):
    """The edit limit of `Graph.stop_after` is reached.

    Not an `Exception`, so that a pass that handles its own errors does not swallow it.
    """
