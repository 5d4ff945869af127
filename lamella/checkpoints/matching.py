"""Whether a graph computes what a model of transformers computes, and with which weights.

The graph is walked from its outputs together with that of the model as it would be built from
the config that is to be written (without data). Where both agree the weights of the one are those
of the other; whatever differs is something that no checkpoint can say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.torch_private import tree_map

_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default})
_NOT_PART = ("hidden_states.", "attentions.", "encoder_hidden_states.", "decoder_hidden_states.")
"""Outputs that show the inside of a model, of which passes may have taken some out."""


@dataclass(frozen=True)
class Bound:
    """A weight of the model, or an expression of one, and what the graph has in its place.

    Attributes:
        wanted: The node of the model: it reads a weight, or computes a constant from weights.
        found: The node of the graph that reads the value; None where an operand is left out
            that changes nothing (the scale of a norm after `fold-norms`).
        reader: The node of the graph that reads the value; one of few bits unpacks it.
        operand: The operand of `reader`, by schema name.
    """

    wanted: Node
    found: Node | None
    reader: Node
    operand: str

    @property
    def is_packed(self) -> bool:
        """Whether the graph holds the weight in few bits."""
        return self.found is not None and self.operand == "packed"


@dataclass
class Comparison:
    """What a walk over both graphs found.

    Attributes:
        bound: The weights.
        differences: What the model computes otherwise, for people.
        rounded: Tables that the graph holds less exactly than the model computes them.
    """

    bound: list[Bound] = field(default_factory=list[Bound])
    differences: list[str] = field(default_factory=list[str])
    rounded: list[str] = field(default_factory=list[str])


def compare(graph: Graph, model: Graph) -> Comparison:
    """Walk `graph` and `model` side by side, from their outputs to their inputs."""
    return _Walk(graph, model).run()


class _Walk:
    def __init__(self, graph: Graph, model: Graph) -> None:
        self.graph, self.model = graph, model
        self.constants = {id(graph): _constants(graph), id(model): _constants(model)}
        self.found = Comparison()
        self.seen: set[tuple[Node, Node]] = set()
        self.waiting: list[tuple[Node, Node, Node, str]] = []

    def run(self) -> Comparison:
        for have, want in self._outputs():
            self._value(have, want, self.graph.output, "output")
        while self.waiting:
            have, want, reader, operand = self.waiting.pop()
            if (have, want) not in self.seen:
                self.seen.add((have, want))
                self._pair(have, want, reader, operand)
        return self.found

    def _outputs(self) -> Iterator[tuple[Any, Any]]:
        mine = dict(zip(self.graph.signature.outputs, self.graph.outputs, strict=True))
        theirs = dict(zip(self.model.signature.outputs, self.model.outputs, strict=True))
        shared = [name for name in theirs if name in mine and not name.startswith(_NOT_PART)]
        if not shared:
            self._differ(f"the graph has the outputs {', '.join(mine)}, not {', '.join(theirs)}")
        return ((mine[name], theirs[name]) for name in shared)

    def _pair(self, have: Node, want: Node, reader: Node, operand: str) -> None:
        if want in self.constants[id(self.model)]:
            self._constant(have, want, reader, operand)
        elif have.op == "placeholder" or want.op == "placeholder":
            if have.op != want.op or have.target != want.target:
                self._differ(f"{_text(have)} where the model has {_text(want)}")
        elif (packed := _packed(have)) is not None and _is_unpacked(packed, want):
            self._few_bits(packed, want)
        elif have.target is want.target:
            self._operands(have, want)
        else:
            self._differ(f"{_text(have)} where the model has {_text(want)}")

    def _operands(self, have: Node, want: Node) -> None:
        mine, theirs = _bound(have), _bound(want)
        for name in theirs:
            if _may_be_left_out(have, name, mine.get(name), theirs[name]):
                self.found.bound.append(Bound(theirs[name], None, have, name))
            else:
                self._value(mine.get(name), theirs[name], have, name)

    def _few_bits(self, have: Node, want: Node) -> None:
        """`linear_nbits` where the model has `linear`, and so for embeddings."""
        mine, theirs = ops.bind(have), ops.bind(want)
        for name in ("input", "bias", "indices"):
            if name in theirs:
                self._value(mine.get(name), theirs[name], have, name)
        self.found.bound.append(Bound(theirs["weight"], mine["packed"], have, "packed"))

    def _constant(self, have: Node, want: Node, reader: Node, operand: str) -> None:
        if have not in self.constants[id(self.graph)]:
            self._differ(f"{_text(have)} where the model has the constant {want.name}")
        elif not _weights_without_data(self.model, want):
            self._table(have, want)
        elif (packed := _packed(have)) is not None and _is_unpacked(packed, want):
            self._few_bits(packed, want)
        elif have.op == "get_attr":
            if want.op != "get_attr" or _shape(have) == _shape(want):
                self.found.bound.append(Bound(want, have, reader, operand))
            else:
                self._differ(f"{have.target} is {_shape(have)} where the model has {_shape(want)}")
        elif have.target is want.target:
            self._operands(have, want)
        else:
            self._differ(f"{_text(have)} where the model has {_text(want)}")

    def _table(self, have: Node, want: Node) -> None:
        """A table that follows from the code and the config: the same numbers in both."""
        mine, theirs = evaluate(self.graph, have, {}), evaluate(self.model, want, {})
        if _same_value(mine, theirs):
            return
        dtypes = {self.graph.weight(weight).dtype for weight in weights_of(have)}
        if any(_same_value(mine, theirs.to(dtype).to(mine.dtype)) for dtype in dtypes):
            # Whoever casts a whole model casts its tables; those that load it compute them anew.
            self.found.rounded.append(want.name)
        else:
            self._differ(f"the constant {have.name} is not {want.name} of the model")

    def _value(self, have: Any, want: Any, reader: Node, operand: str) -> None:
        """Two arguments: nodes wait for their turn, everything else is compared at once."""
        if isinstance(have, Node) and isinstance(want, Node):
            if not (_is_size(have) and _is_size(want)):
                self.waiting.append((have, want, reader, operand))
        elif isinstance(have, list | tuple) and isinstance(want, list | tuple):
            pairs = (cast(Sequence[Any], have), cast(Sequence[Any], want))
            if len(pairs[0]) != len(pairs[1]):
                self._differ(f"{operand} of {_text(reader)} has {len(pairs[0])} entries")
                return
            for mine, theirs in zip(*pairs, strict=True):
                self._value(mine, theirs, reader, operand)
        elif not _same_value(have, want):
            self._differ(f"{operand} of {_text(reader)} is {have}, not {want} as in the model")

    def _differ(self, text: str) -> None:
        self.found.differences.append(text)


def evaluate(graph: Graph, node: Node, known: Mapping[Node, Any]) -> Any:
    """The value of a constant of `graph`; `known` holds values of nodes that are given."""
    values: dict[Node, Any] = dict(known)

    def value(argument: Any) -> Any:
        if not isinstance(argument, Node):
            return argument
        if argument not in values:
            if argument.op == "get_attr":
                values[argument] = graph.weight(argument)
            else:
                assert callable(argument.target)
                arguments = tree_map(value, argument.args)
                values[argument] = argument.target(*arguments, **tree_map(value, argument.kwargs))
        return values[argument]

    with torch.no_grad():
        return value(node)


def weights_of(node: Node) -> list[Node]:
    """The weights that a constant is computed from."""
    found: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one.op == "get_attr":
            found[one] = None
        waiting.extend(one.all_input_nodes)
    return list(found)


def _weights_without_data(model: Graph, node: Node) -> list[Node]:
    return [weight for weight in weights_of(node) if not model.is_loaded(weight)]


def _constants(graph: Graph) -> frozenset[Node]:
    """The nodes that depend on no input."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and all(one in found for one in node.all_input_nodes)
        ):
            found.add(node)
    return frozenset(found)


def _packed(node: Node) -> Node | None:
    """The operator of few bits that `node` is, or casts."""
    if node.target is aten.to.dtype and isinstance(node.args[0], Node):
        node = node.args[0]
    is_packed = node.target in (lam.linear_nbits.default, lam.embedding_nbits.default)
    return node if is_packed else None


def _is_unpacked(packed: Node, want: Node) -> bool:
    linear = packed.target is lam.linear_nbits.default
    if want.target is not (aten.linear.default if linear else aten.embedding.default):
        return False
    weight = ops.bind(want)["weight"]
    return weight.op == "get_attr"


def _may_be_left_out(have: Node, name: str, mine: Any, theirs: Any) -> bool:
    """Whether an operand that the graph lacks is one that can be given without effect."""
    if mine is not None or not isinstance(theirs, Node):
        return False
    if have.target in _NORMS:
        return name in ("weight", "bias")
    return name == "bias" and have.target is aten.linear.default


def _bound(node: Node) -> dict[str, Any]:
    if ops.argument_names(node.target):
        return ops.bind(node)
    return {**{str(place): value for place, value in enumerate(node.args)}, **node.kwargs}


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), SymInt | int)


def _shape(node: Node) -> list[int]:
    return list(node.meta["val"].shape)


def _same_value(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two.to(one.dtype))
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        pairs = (cast(Sequence[Any], one), cast(Sequence[Any], two))
        return len(pairs[0]) == len(pairs[1]) and all(map(_same_value, *pairs))
    return type(one) is type(two) and bool(one == two)


def _text(node: Node) -> str:
    if node.op == "call_function":
        return f"{node.name} ({ops.op_name(node.target)})"
    return f"{node.target}"
