"""Tables of cosines and sines, computed when the model is written.

In a graph that continues from a cache the angles of a rotary embedding are a computation on the
positions of the new tokens. Where they depend on nothing else, the table of all positions is a
constant, and an attention that knows where its tokens stand needs no angles at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from lamella.ir import ops
from lamella.ir.graph import Graph

aten = torch.ops.aten
lam = torch.ops.lamella

_POINTWISE = frozenset({aten.unsqueeze.default, aten.to.dtype, aten.clone.default})
_MOST_ROWS = 32768
_ROWS = 4096


@dataclass(frozen=True)
class Table:
    """The angles of all positions.

    Attributes:
        cos: ``[positions, width / 2]``.
        sin: As `cos`.
    """

    cos: Tensor
    sin: Tensor


def longest_of(graph: Graph) -> int:
    """Tokens of the longest sequence that the model was made for, or a usual number."""
    config: Mapping[str, Any] = graph.origin.config or {}
    most = config.get("max_position_embeddings", config.get("n_positions"))
    return most if isinstance(most, int) else _ROWS


def rows_of(graph: Graph) -> int:
    """How many positions a table has: those of the model, as far as memory is no matter."""
    return min(longest_of(graph), _MOST_ROWS)


def rotated_alike(query: Node, key: Node) -> bool:
    """Whether the queries and keys of an attention are rotated, and by the same angles."""
    if {query.target, key.target} != {lam.rotary_embedding.default}:
        return False
    one, two = ops.bind(query), ops.bind(key)
    return all(one[name] is two[name] for name in ("cos", "sin", "interleaved"))


def table_of(graph: Graph, rotary: Node) -> Table | None:
    """The angles of `lamella::rotary_embedding` by position, or None.

    None where they depend on something else than the position, or the two halves of a row are
    not the same, or the channels are paired otherwise, or there are not a multiple of 16, which
    `com.microsoft.GroupQueryAttention` asks for.
    """
    bound, positions = ops.bind(rotary), _positions(graph)
    if positions is None or bound["interleaved"]:
        return None
    rows = rows_of(graph)
    halves: list[Tensor] = []
    for name in ("cos", "sin"):
        if not _depends_only_on(bound[name], positions, {}):
            return None
        given = {positions: torch.arange(rows)[None]}
        value = _value(graph, bound[name], given)
        if tuple(value.shape[:-1]) != (1, 1, rows):
            return None
        first, second = value[0, 0].float().chunk(2, dim=-1)
        if not torch.equal(first, second):
            return None
        halves.append(first.contiguous())
    return Table(*halves) if halves[0].shape[1] % 8 == 0 else None


def _positions(graph: Graph) -> Node | None:
    if graph.cache is None or graph.cache.positions is None:
        return None
    names = graph.signature.inputs
    return graph.inputs[names.index(graph.cache.positions)]


def _depends_only_on(node: Node, positions: Node, known: dict[Node, bool]) -> bool:
    """Whether each row of a value follows from the position of its token alone."""
    if node is positions or node.op == "get_attr":
        return True
    if node not in known:
        known[node] = _is_pointwise(node) and all(
            _depends_only_on(source, positions, known) for source in node.all_input_nodes
        )
    return known[node]


def _is_pointwise(node: Node) -> bool:
    """Whether an operation treats every token alone and in the same way."""
    if node.op != "call_function":
        return False
    if node.target in _POINTWISE:
        return True
    rank = node.meta["val"].ndim if isinstance(node.meta.get("val"), Tensor) else 0
    if node.target is aten.cat.default:
        return ops.bind(node)["dim"] % rank == rank - 1
    facts = ops.facts(node.target)
    return facts is not None and facts.category == "elementwise"


def _value(graph: Graph, node: Node, known: dict[Node, Tensor]) -> Tensor:
    if node not in known:
        if node.op == "get_attr":
            known[node] = graph.weight(node)
        else:
            swap = lambda source: _value(graph, source, known)  # noqa: E731
            args = map_arg(node.args, swap)
            kwargs = map_arg(node.kwargs, swap)
            assert not isinstance(node.target, str)
            known[node] = node.target(*args, **kwargs)  # pyright: ignore[reportArgumentType]
    return known[node]
