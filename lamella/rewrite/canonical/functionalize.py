"""Operators that write into an argument become functional.

A write is seen by everything that later reads the value, and by everything that later reads a
view of the same memory. Each of them is given the new value: the base is rebuilt with the
written part put back, and the views are taken again from it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import CaptureError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.torch_private import StorageWeakRef, tree_map
from lamella.rewrite.canonical.extents import parts_of
from lamella.rewrite.canonical.writeback import part_put_back

aten = torch.ops.aten

_METADATA = frozenset(
    {
        aten.detach_.default,
        aten.squeeze_.dim,
        aten.unsqueeze_.default,
        aten.transpose_.default,
        aten.t_.default,
    }
)
"""In-place operators that change how a value is looked at, and not what is in memory."""

_MAYBE_COPY = frozenset({"to", "contiguous", "reshape", "reshape_as", "flatten", "unflatten"})


@dataclass
class _Writes:
    graph: Graph
    place: dict[Node, int]
    problems: list[str] = field(default_factory=list)
    count: int = 0
    inputs: list[str] = field(default_factory=list)

    def readers_after(self, node: Node, write: Node) -> list[Node]:
        """Who reads `node` after `write` has happened."""
        return [
            user
            for user in node.users
            if user is not write and self.place.get(user, -1) > self.place[write]
        ]


@dataclass(frozen=True)
class Functionalization:
    """What `functionalize` did.

    Attributes:
        count: How many writes became functional.
        inputs: Names of inputs that the model writes into; the graph does not.
    """

    count: int
    inputs: tuple[str, ...]


def functionalize(graph: Graph) -> Functionalization:
    """Replace every operator that writes into an argument by one that returns the new value.

    Raises:
        CaptureError: The model writes into a weight or a buffer, writes through a view that
            can't be put back, or uses an in-place operator without a functional twin; all of
            them are listed.
    """
    nodes = graph.nodes
    writes = _Writes(graph, {node: place for place, node in enumerate(nodes)})
    for node in nodes:
        if node.op == "call_function" and ops.is_inplace(node.target):
            with graph.author("functionalize"):
                _functionalize(writes, node)
    if writes.problems:
        raise CaptureError(
            "the model writes into memory in ways that have no functional form: "
            + "; ".join(writes.problems)
        )
    if writes.count:
        graph.prune()
    return Functionalization(writes.count, tuple(dict.fromkeys(writes.inputs)))


def _functionalize(writes: _Writes, write: Node) -> None:
    target = _written(write)
    if target is None:
        writes.problems.append(f"{_named(write)} has no single tensor that it writes into")
        return
    chain = _chain(writes.graph, target)
    base = chain[0]
    if base.op == "get_attr" and write.target not in _METADATA:
        writes.problems.append(f"{_named(write)} writes into the weight or buffer {base.target}")
        return
    new = _new_value(writes, write, target)
    if new is None:
        writes.problems.append(f"{_named(write)} has no functional twin")
        return
    if base.op == "placeholder" and write.target not in _METADATA:
        writes.inputs.append(str(base.target))
    _hand_over(writes, write, chain, new)
    writes.graph.replace(write, new)
    writes.graph.erase([write])
    writes.count += 1


def _hand_over(writes: _Writes, write: Node, chain: Sequence[Node], new: Node) -> None:
    """Give the new value to everything that reads the memory after `write`."""
    graph, target = writes.graph, chain[-1]
    if write.target in _METADATA:
        _redirect(writes, target, new, write)
        return
    others = [node for node in _aliases(graph, chain[0], write) if node is not target]
    others = [node for node in others if writes.readers_after(node, write)]
    if not others:
        _redirect(writes, target, new, write)
        return
    whole = new
    for inner, outer in zip(reversed(chain[1:]), reversed(chain[:-1]), strict=True):
        put = part_put_back(graph, outer, inner, whole, write)
        if put is None:
            readers = [f"{user.name} reads {node.name}" for node in others for user in node.users]
            writes.problems.append(
                f"{_named(write)} writes through {inner.name} ({ops.op_name(inner.target)}) and "
                f"the memory is read later: {', '.join(readers)}"
            )
            return
        whole = put
    for node in [target, *others]:
        again = _view_again(graph, _chain(graph, node), whole, write)
        writes.place.update((made, writes.place[write]) for made in again)
        _redirect(writes, node, again[-1] if again else whole, write)


def _redirect(writes: _Writes, old: Node, new: Node, write: Node) -> None:
    for user in writes.readers_after(old, write):
        user.replace_input_with(old, new)


def _view_again(graph: Graph, chain: Sequence[Node], whole: Node, write: Node) -> list[Node]:
    """The views of `chain`, taken from `whole` instead of from its first node."""
    made: list[Node] = []
    source, old = whole, chain[0]
    for node in chain[1:]:
        before = old

        def swap(argument: Any, before: Node = before, source: Node = source) -> Any:
            return source if argument is before else argument

        called, args, kwargs = parts_of(node)
        args, kwargs = tree_map(swap, args), tree_map(swap, kwargs)
        made.append(graph.call(called, *args, before=write, like=node, **kwargs))
        source, old = made[-1], node
    return made


def _written(write: Node) -> Node | None:
    """The one tensor that `write` writes into."""
    written = ops.written_arguments(write.target)
    found = ops.bind(write).get(written[0]) if len(written) == 1 else None
    return found if isinstance(found, Node) else None


def _new_value(writes: _Writes, write: Node, target: Node) -> Node | None:
    """The value after the write, as a node before it; None if there is no way to say it."""
    graph = writes.graph
    _, (_, *rest), kwargs = parts_of(write)
    if write.target is aten.detach_.default:
        return target
    if write.target is aten.zero_.default:
        return graph.call(aten.zeros_like.default, target, before=write)
    if write.target is aten.fill_.Scalar:
        return graph.call(aten.full_like.default, target, *rest, before=write)
    if write.target in (aten.copy_.default, aten.fill_.Tensor):
        cast = graph.call(aten.type_as.default, rest[0], target, before=write)
        return graph.call(aten.expand_as.default, cast, target, before=write)
    twin = _functional_twin(write.target)
    if twin is None:
        return None
    made = graph.call(twin, target, *rest, before=write, **kwargs)
    if made.meta["val"].dtype != target.meta["val"].dtype:
        made = graph.call(aten.to.dtype, made, target.meta["val"].dtype, before=write)
    return made


def _functional_twin(target: Any) -> Any:
    namespace, name, overload = str(target).split(".")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    if not name.endswith("_") or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    return getattr(packet, overload, None)


def _chain(graph: Graph, node: Node) -> list[Node]:
    """The views from the base of the memory of `node` to `node` itself, both included."""
    chain = [node]
    while (source := _viewed(graph, chain[-1])) is not None:
        chain.append(source)
    return chain[::-1]


def _aliases(graph: Graph, base: Node, write: Node) -> list[Node]:
    """All nodes whose value lies in the memory of `base`, in order."""
    found, queue = [base], [base]
    while queue:
        node = queue.pop()
        for user in node.users:
            if user is not write and user not in found and _viewed(graph, user) is node:
                found.append(user)
                queue.append(user)
    return found


def _viewed(graph: Graph, node: Node) -> Node | None:
    """The node whose memory `node` shares, or None if it has memory of its own."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    if node.target is operator.getitem:
        return source if ops.may_return_alias(source.target) else None
    if not ops.may_return_alias(node.target) or ops.is_inplace(node.target):
        return None
    name = str(node.target).split(".")[1]
    if name in _MAYBE_COPY and not _shares_memory(graph, node, source):
        return None
    return source


def _shares_memory(graph: Graph, node: Node, source: Node) -> bool:
    """Run the operator on fake values and see whether the result is a view."""

    def value_of(argument: Any) -> Any:
        return argument.meta["val"] if isinstance(argument, Node) else argument

    target, args, kwargs = parts_of(node)
    with graph.fake_mode(), torch.no_grad():
        made: Tensor = target(*tree_map(value_of, args), **tree_map(value_of, kwargs))
    one, two = made.untyped_storage(), source.meta["val"].untyped_storage()
    return StorageWeakRef(one) == StorageWeakRef(two)


def _named(node: Node) -> str:
    return f"{node.name} ({ops.op_name(node.target)})"
