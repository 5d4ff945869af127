"""What a relevance rule is, and how the rule of a node is found.

The relevance of a value `x` is ``x * M`` with its coefficient `M`. A rule turns the coefficient
of the result of an operator into coefficients of its arguments, ``rule(coefficient, output,
*arguments) -> one coefficient per argument`` (None for none, a list for a list of tensors). It is
a plain tensor function: on tensors it computes, on traced values it emits nodes.

An operator with several results has a tuple of coefficients and of outputs; what nothing reads
has the coefficient zero.

References:
    [Bach2015]; in the form of gradients with other slopes, [Achtibat2024].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from lamella.ir.ops import bind
from lamella.ir.stream import Block
from lamella.rules.relevance.roles import Role

Coefficients = tuple[Any, ...]
Rule = Callable[..., Coefficients]


@dataclass(frozen=True)
class Place:
    """Where a rule is wanted.

    Attributes:
        node: The node.
        roles: The role of every node of the graph.
        block: The block of the residual stream that the node is in, or None.
        depth: Share of the nodes of the graph that come before, in [0, 1).
    """

    node: Node
    roles: Mapping[Node, Role]
    block: Block | None = None
    depth: float = 0.0

    def operand(self, name: str) -> Any:
        """The argument called `name` in the schema."""
        return bind(self.node).get(name)

    def role(self, operand: Any) -> Role:
        """The role of an operand; numbers are constants."""
        return self.roles[operand] if isinstance(operand, Node) else Role.CONSTANT


@dataclass(frozen=True)
class Chosen:
    """An entry of a table whose rule depends on the place.

    Attributes:
        choose: Gives the rule.
    """

    choose: Callable[[Place], Rule]


Entry = Rule | Chosen


@dataclass(frozen=True)
class Terminal:
    """What a rule returns for an input of the model that ends there: relevance, no coefficient.

    Attributes:
        relevance: Of the shape of the argument.
    """

    relevance: Any


def nothing(coefficient: Any, output: Any, *arguments: Any) -> Coefficients:
    """No argument gets anything: comparisons, indices, shapes, rounding."""
    return (None,) * len(arguments)


def straight(coefficient: Any, output: Any, first: Any, *rest: Any) -> Coefficients:
    """The first argument gets what the result has: copies."""
    return (coefficient, *(None,) * len(rest))
