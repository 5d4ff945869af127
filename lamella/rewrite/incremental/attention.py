"""The attentions of a graph: what they read, and what their masks say.

A mask is a computation on positions. What it says is found by computing it for a few lengths
and comparing it with the masks there are words for: the future is hidden, all but the last
tokens are hidden, the padding is hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.symbols import shape_of
from lamella.rewrite.incremental.evaluate import Evaluation

aten = torch.ops.aten
_HIDDEN = -1e4


@dataclass(frozen=True)
class Site:
    """One attention.

    Attributes:
        node: The node that gives its result.
        query: Queries, ``[batch, heads, sequence, width]``.
        key: Keys, before heads are repeated.
        value: Values, likewise.
        mask: What hides keys (boolean) or is added to scores, or None.
        scale: Of the scores.
        softcap: Of the scores, or 0.
        is_causal: Whether the operator itself hides the future.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float
    softcap: float = 0.0
    is_causal: bool = False


def sites_of(graph: Graph) -> list[Site]:
    """Every attention of `graph`, in order: the operator, and softcapped ones written out."""
    found: list[Site] = []
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            found.append(_of_operator(node))
        elif node.target is aten.matmul.default and (site := _softcapped(node)) is not None:
            found.append(site)
    return found


def _of_operator(node: Node) -> Site:
    bound = ops.bind(node)
    scale = bound["scale"]
    width = int(shape_of(bound["query"])[-1])
    return Site(
        node,
        bound["query"],
        bound["key"],
        bound["value"],
        bound["attn_mask"],
        float(width**-0.5 if scale is None else scale),
        is_causal=bool(bound["is_causal"]),
    )


def _softcapped(node: Node) -> Site | None:
    """``softmax(c tanh(s q k^T / c) + mask) v``, which no operator of PyTorch computes."""
    weights, value = _operands(node, aten.matmul.default)
    added, *_ = _operands(weights, aten.softmax.int)
    scores, mask = _operands(added, aten.add.Tensor)[:2]
    capped, softcap = _operands(scores, aten.mul.Tensor)[:2]
    halved, *_ = _operands(capped, aten.tanh.default)
    scaled, divisor = _operands(halved, aten.div.Tensor)[:2]
    product, scale = _operands(scaled, aten.mul.Tensor)[:2]
    if product is None:
        product, scale = scaled, 1.0
    query, turned = _operands(product, aten.matmul.default)[:2]
    key, *_ = _operands(turned, aten.transpose.int)
    numbers = all(isinstance(number, int | float) for number in (softcap, divisor, scale))
    if not numbers or softcap != divisor or not isinstance(mask, Node) or key is None:
        return None
    found = (query, _unrepeated(key), _unrepeated(value))
    return Site(node, *found, mask, float(scale), softcap=float(softcap))


def _operands(node: Any, target: Any) -> tuple[Any, ...]:
    """The operands of a call of `target`; Nones for anything else."""
    found = isinstance(node, Node) and node.target is target
    return tuple(node.args) if found else (None, None)


def _unrepeated(node: Any) -> Node:
    """Keys or values before each head was repeated."""
    expanded, *_ = _operands(node, aten.reshape.default)
    unsqueezed, *_ = _operands(expanded, aten.expand.default)
    before, axis = _operands(unsqueezed, aten.unsqueeze.default)[:2]
    if before is not None and axis == 2:
        return before
    repeated, *_ = _operands(node, aten.repeat_interleave.self_int)
    if repeated is not None and ops.bind(node)["dim"] == 1:
        return repeated
    return node


@dataclass(frozen=True)
class Meaning:
    """What a mask says in words.

    Attributes:
        window: How many keys a query sees at most; 0 means all up to its own.
        padding: Whether it hides what the mask of the tokens hides.
    """

    window: int
    padding: bool


def meaning_of(rows: Node, evaluation: Evaluation) -> Meaning | None:
    """What a mask says, or None when there is no word for it.

    Args:
        rows: The mask with the rows of the new tokens only, ``[..., new, past + new]``.
        evaluation: Computes values of the graph at other lengths.
    """
    candidates = [0, *sorted(_constants(rows))]
    lengths = [(5, 0), (3, 4), (1, 9)] + [(3, c + 2) for c in candidates[1:]]
    seen = [(n, p, m, _seen(evaluation.at(rows, n, p, m))) for n, p, m in _cases(lengths)]
    if any(one is None for *_, one in seen):
        return None
    for window in candidates:
        for padding in (True, False):
            if all(_agrees(one, n, p, m, window, padding) for n, p, m, one in seen):
                return Meaning(window, padding)
    return None


def hides_future(rows: Node, evaluation: Evaluation) -> bool:
    """Whether no query sees a later key, whatever else the mask says."""
    for new, past, mask in _cases([(5, 0), (3, 4)]):
        value = evaluation.at(rows, new, past, torch.ones_like(mask))
        hidden = ~value if value.dtype == torch.bool else value <= _HIDDEN
        future = ~_causal(new, past, 0)
        if not bool((hidden | ~future).all()):
            return False
    return True


def _cases(lengths: list[tuple[int, int]]) -> Iterator[tuple[int, int, Tensor]]:
    """New and past tokens, with a mask of two rows of which one is padded on the left."""
    for new, past in lengths:
        mask = torch.ones(2, new + past, dtype=torch.int64)
        mask[1, : min(2, new + past - 1)] = 0
        yield new, past, mask


def _seen(value: Tensor) -> Tensor | None:
    """What a mask lets a query see; None if it does more to the scores than hide keys."""
    if value.dtype == torch.bool:
        return value
    hidden = value <= _HIDDEN
    return ~hidden if bool(((value == 0) | hidden).all()) else None


def _agrees(
    seen: Tensor | None, new: int, past: int, mask: Tensor, window: int, padding: bool
) -> bool:
    wanted = _causal(new, past, window)[None, None]
    if padding:
        wanted = wanted & mask.bool()[:, None, None, :]
    assert seen is not None
    # What a query of the padding sees is nobody's business: its result is not read.
    real = mask.bool()[:, None, past:, None] if padding else torch.ones(1, 1, new, 1).bool()
    shape = torch.broadcast_shapes(seen.shape, wanted.shape, real.shape)
    seen, wanted, real = (x.broadcast_to(shape) for x in (seen, wanted, real))
    return bool((seen[real] == wanted[real]).all())


def _causal(new: int, past: int, window: int) -> Tensor:
    queries = torch.arange(past, past + new)[:, None]
    keys = torch.arange(past + new)[None]
    return (keys <= queries) & (keys > queries - window if window else keys >= 0)


def _constants(node: Node) -> set[int]:
    """The integers that a computation writes down: one of them may be a window."""
    found: set[int] = set()
    todo, done = [node], {node}
    while todo:
        one = todo.pop()
        if one.target in (aten.sub.Tensor, aten.add.Tensor, aten.lt.Scalar, aten.gt.Scalar):
            found |= {abs(a) for a in one.args if type(a) is int and 1 < abs(a) < 2**20}
        fresh = [source for source in one.all_input_nodes if source not in done]
        done.update(fresh)
        todo.extend(fresh)
    return found | {c + 1 for c in found}
