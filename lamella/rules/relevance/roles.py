"""What each value of a graph is for: the rules of products and divisions follow from it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Set
from typing import Any

from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam


class Role(enum.Enum):
    """What a value is for.

    Attributes:
        CONSTANT: Computed from weights and numbers alone.
        POSITION: Computed from inputs that are not attributed (masks, positions), or in a way
            that no relevance passes (indices, comparisons, rounding).
        SIGNAL: Carries the attributed inputs.
        STATISTIC: A mean, sum or the like of a signal; a signal unless it becomes a norm.
        GATE: In [0, 1] or a positive factor by construction: sigmoid, softmax, exponential.
        STEP: The step size of a state-space layer: a softplus. Treated as a gate.
        DRIVE: A signal times a step size: what drives a state-space layer.
        NORM: A divisor, or the inverse of one.
    """

    CONSTANT = "constant"
    POSITION = "position"
    SIGNAL = "signal"
    STATISTIC = "statistic"
    GATE = "gate"
    STEP = "step"
    DRIVE = "drive"
    NORM = "norm"

    @property
    def carries(self) -> bool:
        """Whether relevance of the inputs can be in the value."""
        return self not in (Role.CONSTANT, Role.POSITION)


DETACHED = frozenset(
    {
        *(aten.sign.default, aten.floor.default, aten.ceil.default, aten.round.default),
        *(aten.div.Tensor_mode, aten.floor_divide.default, aten.embedding.default),
        *(lam.embedding_nbits.default, aten.argmax.default, aten.histc.default),
    }
)
"""Operators that no relevance passes, although their results may be floating-point numbers."""

_GATES = frozenset(
    {aten.sigmoid.default, aten.hardsigmoid.default, aten.softmax.int, aten.exp.default}
)
_STATISTICS = frozenset(
    {
        *(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default),
        *(aten.amax.default, aten.amin.default, aten.var.correction),
    }
)
_INVERTING = frozenset({aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default})
_PASSING = frozenset(
    {
        *(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.div.Tensor),
        *(aten.clamp.default, aten.maximum.default, aten.minimum.default, aten.neg.default),
        *(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.to.dtype),
        *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.reciprocal.default),
        *(aten.gather.default, aten.index.Tensor, aten.index_select.default),
        *(aten.topk.default, aten.sort.default, aten.index_put.default, aten.cumsum.default),
    }
)
_CARRIES_DRIVE = frozenset(
    {aten.matmul.default, aten.einsum.default, aten.sum.dim_IntList, aten.cumsum.default}
)


def sources_of(graph: Graph) -> dict[str, Node]:
    """The values whose relevance is asked for: name of an input -> node.

    A floating-point input is its own source, unless it is a mask. For an integer input it is
    what an embedding gives for it; indices that are computed from it (positions that count what
    is not padding) are none. A second embedding of the same input is called ``name.1``.
    """
    found: dict[str, Node] = {}
    names = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
    for node, name in names.items():
        if _is_float(node) and not name.endswith("mask"):
            found[name] = node
    for node in graph.find(aten.embedding.default, lam.embedding_nbits.default):
        name = names.get(_origin(graph.operand(node, "indices")))
        if name is not None:
            place = sum(other.split(".")[0] == name for other in found)
            found[f"{name}.{place}" if place else name] = node
    return found


def roles_of(graph: Graph, sources: Iterable[Node]) -> dict[Node, Role]:
    """The role of every node, by one walk in topological order."""
    roles: dict[Node, Role] = {}
    attributed = set(sources)
    for node in graph.nodes:
        if node in attributed:
            roles[node] = Role.SIGNAL
        elif node.op == "placeholder":
            roles[node] = Role.POSITION
        elif node.op == "call_function":
            roles[node] = _role(node, roles)
        else:
            roles[node] = Role.CONSTANT
    return roles


def _role(node: Node, roles: Mapping[Node, Role]) -> Role:
    given = [roles[operand] for operand in node.all_input_nodes]
    if not any(role.carries for role in given):
        return Role.POSITION if Role.POSITION in given else Role.CONSTANT
    if node.target in DETACHED or not _is_float(node):
        return Role.POSITION
    carried = {role for role in given if role.carries}
    for decide in (_made, _norm, _passed):
        if (role := decide(node, carried)) is not None:
            return role
    return Role.SIGNAL


def _made(node: Node, carried: Set[Role]) -> Role | None:
    """The role that an operator gives its result, whatever it reads."""
    if node.target in _GATES:
        return Role.GATE
    if node.target is aten.softplus.default:
        return Role.STEP
    if node.target in (lam.selective_scan.default, lam.head_scan.default):
        return Role.DRIVE
    if node.target is aten.linalg_vector_norm.default:
        return Role.NORM
    if Role.DRIVE in carried and node.target in _CARRIES_DRIVE:
        return Role.DRIVE
    return Role.STATISTIC if node.target in _STATISTICS else None


def _norm(node: Node, carried: Set[Role]) -> Role | None:
    """Norms begin where a statistic is inverted or its root is taken."""
    root = node.target in _INVERTING
    if node.target is aten.pow.Tensor_Scalar:
        exponent: Any = node.args[1]
        root = not isinstance(exponent, Node) and (exponent < 0 or exponent == 0.5)
    return Role.NORM if root and carried <= {Role.STATISTIC, Role.NORM} else None


def _passed(node: Node, carried: Set[Role]) -> Role | None:
    facts = ops.facts(node.target)
    is_view = facts is not None and facts.category == "view"
    if not is_view and node.target not in _PASSING:
        return None
    if node.target is aten.mul.Tensor and Role.STEP in carried and carried - _FACTORS:
        return Role.DRIVE
    if Role.DRIVE in carried:
        return Role.DRIVE
    if carried <= _FACTORS:
        return Role.STEP if carried == {Role.STEP} else Role.GATE
    return next(iter(carried)) if len(carried) == 1 else Role.SIGNAL


_FACTORS = frozenset({Role.GATE, Role.STEP})


def _origin(node: Any) -> Any:
    """Where indices come from, through views and casts."""
    while isinstance(node, Node) and node.op == "call_function":
        facts = ops.facts(node.target)
        if facts is None or facts.category not in ("view", "cast"):
            return None
        node = node.args[0]
    return node


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(part, Tensor) and part.is_floating_point() for part in parts)
