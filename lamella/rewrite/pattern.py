"""Small trees that are matched against a graph, from a node upwards to its operands.

A pattern is data: `Call` is an operator applied to patterns, `Var` names what it meets,
`Number` names a constant, `AnyOf` offers alternatives, `Cast` looks through conversions of the
dtype. A plain Python value in a pattern stands for itself::

    Call(aten.mul.Tensor, Var("x"), Call(aten.sigmoid.default, Var("x")))

matches ``x * sigmoid(x)`` in either order. What a `Call` doesn't mention must have its default;
``...`` as the last operand allows anything.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import EllipsisType, MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph

aten = torch.ops.aten

COMMUTATIVE = frozenset(
    {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.logical_and.default,
        aten.logical_or.default,
    }
)
"""Operators whose first two operands are tried in both orders."""

_WITHOUT_MEANING = frozenset(
    {"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"}
)


@dataclass(frozen=True)
class Match:
    """Where a pattern was met.

    Attributes:
        root: The node that the whole pattern stands for.
        bindings: Name of each `Var` and `Number` -> the node or value it met.
        nodes: The nodes of the calls of the pattern, the root first.
    """

    root: Node
    bindings: Mapping[str, Any]
    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What `name` met, or `default` where the alternative that met has no such name."""
        return self.bindings.get(name, default)


@dataclass(frozen=True)
class _State:
    bindings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    nodes: tuple[Node, ...] = ()

    def bound(self, name: str, value: Any) -> _State:
        return _State({**self.bindings, name: value}, self.nodes)


class Pattern(abc.ABC):
    """A part of a pattern."""

    @abc.abstractmethod
    def meet(self, value: Any, state: _State, matcher: Matcher) -> Iterator[_State]:
        """Every way in which `value` (a node or a constant) fits, given what is bound."""


@dataclass(frozen=True)
class Var(Pattern):
    """Anything, under a name; the same name twice means the same node or an equal constant."""

    name: str

    def meet(self, value: Any, state: _State, matcher: Matcher) -> Iterator[_State]:
        """Bind, or compare with what is bound."""
        if self.name not in state.bindings:
            yield state.bound(self.name, value)
        elif _same(state.bindings[self.name], value):
            yield state
        else:
            matcher.miss(
                state, value, f"is not {_show(state.bindings[self.name])}, met as {self.name!r}"
            )


@dataclass(frozen=True)
class Number(Pattern):
    """A constant number under a name: a literal, or a loaded weight with one element."""

    name: str

    def meet(self, value: Any, state: _State, matcher: Matcher) -> Iterator[_State]:
        """Bind the number as a Python scalar."""
        number = matcher.number(value)
        if number is None:
            matcher.miss(state, value, "is not a constant number")
        elif self.name not in state.bindings:
            yield state.bound(self.name, number)
        elif state.bindings[self.name] == number:
            yield state
        else:
            matcher.miss(state, value, f"is not {state.bindings[self.name]}")


@dataclass(frozen=True)
class Literal(Pattern):
    """One constant.

    Numbers are compared with a relative tolerance, since models spell ``sqrt(2 / pi)`` with five
    to sixteen digits.
    """

    value: Any
    tolerance: float = 1e-6

    def meet(self, value: Any, state: _State, matcher: Matcher) -> Iterator[_State]:
        """Compare."""
        if isinstance(self.value, int | float) and not isinstance(self.value, bool):
            number = matcher.number(value)
            same = number is not None and math.isclose(number, self.value, rel_tol=self.tolerance)
        else:
            same = _same(value, self.value)
        if same:
            yield state
        else:
            matcher.miss(state, value, f"is not {_show(self.value)}")


@dataclass(frozen=True)
class Many(Pattern):
    """A list or tuple of patterns, as long as the argument."""

    parts: tuple[Pattern, ...]

    def meet(self, value: Any, state: _State, matcher: Matcher) -> Iterator[_State]:
        """Match one by one."""
        if not isinstance(value, list | tuple) or len(value) != len(self.parts):
            matcher.miss(state, value, f"is not a list of {len(self.parts)}")
            return
        yield from _each(tuple(zip(self.parts, value, strict=True)), state, matcher)


@dataclass(frozen=True, init=False)
class AnyOf(Pattern):
    """The first alternatives that fit."""

    alternatives: tuple[Pattern, ...]

    def __init__(self, *alternatives: Any) -> None:
        """Each alternative is a pattern or a plain value."""
        object.__setattr__(self, "alternatives", tuple(map(_pattern, alternatives)))

    def meet(self, value: Any, state: _State, matcher: Matcher) -> Iterator[_State]:
        """Try in order."""
        for alternative in self.alternatives:
            yield from alternative.meet(value, state, matcher)


@dataclass(frozen=True, init=False)
class Cast(Pattern):
    """What is inside, with or without conversions of the dtype (`aten.to.dtype`) around it."""

    inside: Pattern

    def __init__(self, inside: Any) -> None:
        """`inside` is a pattern or a plain value."""
        object.__setattr__(self, "inside", _pattern(inside))

    def meet(self, value: Any, state: _State, matcher: Matcher) -> Iterator[_State]:
        """Try as it is, then without the conversion."""
        yield from self.inside.meet(value, state, matcher)
        while isinstance(value, Node) and value.target is aten.to.dtype:
            state = _State(state.bindings, (*state.nodes, value))
            value = value.args[0]
            yield from self.inside.meet(value, state, matcher)


@dataclass(frozen=True, init=False)
class Call(Pattern):
    """An operator applied to patterns, by position or by schema name.

    Attributes:
        targets: The operators that fit.
        operands: Patterns by position.
        named: Patterns by name.
        open: Whether operands that are not mentioned may have any value; otherwise they must
            have their default.
    """

    targets: tuple[Any, ...]
    operands: tuple[Pattern, ...]
    named: tuple[tuple[str, Pattern], ...]
    open: bool

    def __init__(self, target: Any, /, *operands: Any, **named: Any) -> None:
        """`target` is an operator or a tuple of them; ``...`` as the last operand opens."""
        opened = bool(operands) and isinstance(operands[-1], EllipsisType)
        kept = operands[:-1] if opened else operands
        pairs = tuple((name, _pattern(value)) for name, value in named.items())
        object.__setattr__(self, "targets", target if isinstance(target, tuple) else (target,))
        object.__setattr__(self, "operands", tuple(map(_pattern, kept)))
        object.__setattr__(self, "named", pairs)
        object.__setattr__(self, "open", opened)

    def meet(self, value: Any, state: _State, matcher: Matcher) -> Iterator[_State]:
        """Match the operator, then the operands, for a commutative one in both orders."""
        if not isinstance(value, Node) or value.target not in self.targets:
            wanted = " or ".join(ops.op_name(target) for target in self.targets)
            matcher.miss(state, value, f"is not {wanted}")
            return
        entered = _State(state.bindings, (*state.nodes, value))
        pairs = self._pairs(value, entered, matcher)
        if pairs is None:
            return
        yield from _each(pairs, entered, matcher)
        if value.target in COMMUTATIVE and len(self.operands) == 2:
            (first, one), (second, two), *rest = pairs
            yield from _each(((first, two), (second, one), *rest), entered, matcher)

    def _pairs(
        self, node: Node, state: _State, matcher: Matcher
    ) -> tuple[tuple[Pattern, Any], ...] | None:
        names = ops.argument_names(node.target) or tuple(map(str, range(len(node.args))))
        bound = ops.bind(node) or dict(zip(names, node.args, strict=True))
        wanted = {**dict(zip(names, self.operands, strict=False)), **dict(self.named)}
        if not self.open:
            defaults = ops.argument_defaults(node.target)
            for name, value in bound.items():
                known = name in wanted or name in _WITHOUT_MEANING
                if not known and not (name in defaults and _same(value, defaults[name])):
                    matcher.miss(state, node, f"has {name}={_show(value)}")
                    return None
        missing = [name for name in wanted if name not in bound]
        if missing or len(self.operands) > len(names):
            matcher.miss(state, node, f"has no operand {', '.join(missing)}")
            return None
        return tuple((pattern, bound[name]) for name, pattern in wanted.items())


@dataclass(frozen=True)
class Miss:
    """How far a pattern came that did not match.

    Attributes:
        matched: The nodes that fitted, the root first.
        value: The node or constant that did not fit.
        reason: Why, as the end of a sentence about `value`.
    """

    matched: tuple[Node, ...]
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{_show(self.value)} {self.reason}"


class Matcher:
    """Matches patterns on one graph and remembers how far the last one came."""

    def __init__(self, graph: Graph) -> None:
        """Numbers may be read from the weights of `graph`."""
        self._graph = graph
        self.nearest: Miss | None = None

    def match(self, pattern: Pattern, root: Node) -> Match | None:
        """The first way in which `pattern` fits `root`, or None (then see `nearest`)."""
        self.nearest = None
        for state in pattern.meet(root, _State(), self):
            return Match(root, MappingProxyType(dict(state.bindings)), state.nodes)
        return None

    def miss(self, state: _State, value: Any, reason: str) -> None:
        """Remember the attempt that matched most nodes."""
        if self.nearest is None or len(state.nodes) > len(self.nearest.matched):
            self.nearest = Miss(state.nodes, value, reason)

    def number(self, value: Any) -> int | float | None:
        """`value` as a number: a literal, a filled tensor or a loaded weight of one element."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        if not isinstance(value, Node) or not isinstance(value.meta.get("val"), Tensor):
            return None
        shape = tuple(value.meta["val"].shape)
        if any(not isinstance(size, int) or size != 1 for size in shape):
            return None
        if value.target is aten.full.default:
            return self.number(value.args[1])
        if value.op == "get_attr" and self._graph.is_loaded(value):
            found = self._graph.weight(value).item()
            return None if isinstance(found, bool | complex) else found
        return None


def _pattern(value: Any) -> Pattern:
    if isinstance(value, Pattern):
        return value
    if isinstance(value, list | tuple):
        return Many(tuple(map(_pattern, value)))
    return Literal(value)


def _each(
    pairs: tuple[tuple[Pattern, Any], ...], state: _State, matcher: Matcher
) -> Iterator[_State]:
    if not pairs:
        yield state
        return
    (pattern, value), *rest = pairs
    for after in pattern.meet(value, state, matcher):
        yield from _each(tuple(rest), after, matcher)


def _same(one: Any, two: Any) -> bool:
    """Identity for nodes; equality of value and kind for constants."""
    if isinstance(one, Node) or isinstance(two, Node):
        return one is two
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    return isinstance(one, bool) == isinstance(two, bool) and bool(one == two)


def _show(value: Any) -> str:
    if isinstance(value, Node):
        name = ops.op_name(value.target) if value.op == "call_function" else value.op
        return f"{value.name} ({name})"
    return str(value) if isinstance(value, torch.dtype | torch.device) else repr(value)
