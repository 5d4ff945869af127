"""What each value of a causal graph depends on: nothing new, the length, or the new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import IncrementalError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.symbols import shape_of, size_of

aten = torch.ops.aten


class Role(Enum):
    """What a value depends on.

    ``ONCE``: not on the sequence that grows (weights, the states of an encoder). ``LENGTH``: on
    how long the sequence is and on what its mask hides, but on no token (masks, position
    tables). ``NEW``: on tokens; row `t` of it belongs to token `t`.
    """

    ONCE = "once"
    LENGTH = "length"
    NEW = "new"


def tokens_of(graph: Graph) -> Node:
    """The input that holds the tokens of the sequence that grows.

    It is the last integer input ``[batch, sequence]`` that an embedding of a vocabulary reads
    and whose length is that of the first output: the decoder's, where there is an encoder.

    Raises:
        IncrementalError: There is none, or its length is fixed.
    """
    wanted = _length_of_output(graph)
    found = [node for node in graph.inputs if _is_tokens(node) and shape_of(node)[1] == wanted]
    if not found:
        raise IncrementalError(
            "no input of integers [batch, sequence] is embedded and as long as the first output, "
            "so there are no tokens to continue from"
        )
    named = [node for node in found if str(node.target).endswith("input_ids")]
    chosen = (named or found)[-1]
    if not isinstance(shape_of(chosen)[1], sympy.Symbol):
        raise IncrementalError(
            f"the sequence of {chosen.target} has the fixed length {shape_of(chosen)[1]}; "
            f"capture with dynamic=True and a sample of more than one token"
        )
    return chosen


def _length_of_output(graph: Graph) -> Any:
    first = graph.outputs[0]
    shape = shape_of(first) if isinstance(first, Node) else ()
    if len(shape) != 3:
        raise IncrementalError(
            f"the first output has the shape {list(shape)}, not [batch, sequence, vocabulary]"
        )
    return shape[1]


def _is_tokens(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 2 or value.is_floating_point():
        return False
    embeds = (aten.embedding.default, torch.ops.lamella.embedding_nbits.default)
    return any(user.target in embeds for user in node.users)


def is_mask(node: Node, length: sympy.Symbol) -> bool:
    """Whether an input masks the tokens of the sequence that grows."""
    shape = shape_of(node)
    return len(shape) == 2 and shape[1] == length and str(node.target).endswith("attention_mask")


def depends_on_length(size: Any, length: sympy.Symbol) -> bool:
    """Whether a size or symbolic integer changes with the sequence that grows."""
    expression = size_of(size) if isinstance(size, int | torch.SymInt) else size
    return isinstance(expression, sympy.Expr) and expression.has(length)


def roles_of(graph: Graph, tokens: Node) -> dict[Node, Role]:
    """The role of every tensor of `graph`, or of what holds tensors; integers have none."""
    length: Any = shape_of(tokens)[1]
    roles: dict[Node, Role] = {}
    for node in graph.nodes:
        if node.op == "output" or isinstance(node.meta.get("val"), int | torch.SymInt):
            continue
        roles[node] = _role(node, roles, tokens, length)
    return roles


def _role(node: Node, roles: Mapping[Node, Role], tokens: Node, length: sympy.Symbol) -> Role:
    if node.op == "placeholder":
        return _role_of_input(node, tokens, length)
    read = {roles[source] for source in node.all_input_nodes if source in roles}
    if Role.NEW in read:
        return Role.NEW
    sizes = [s for s in node.all_input_nodes if s not in roles]
    grows = any(depends_on_length(size.meta["val"], length) for size in sizes)
    return Role.LENGTH if grows or Role.LENGTH in read else Role.ONCE


def _role_of_input(node: Node, tokens: Node, length: sympy.Symbol) -> Role:
    if node is tokens:
        return Role.NEW
    shape = shape_of(node)
    if is_mask(node, length):
        return Role.LENGTH
    return Role.NEW if any(depends_on_length(size, length) for size in shape) else Role.ONCE


def is_size(node: Node) -> bool:
    """Whether a node computes an integer from shapes."""
    return node.op == "call_function" and ops.is_shape_arithmetic(node.target)
