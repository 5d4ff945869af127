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
    weights = node.args[0]
    if not _is(weights, aten.softmax.int) or not _is(added := weights.args[0], aten.add.Tensor):
        return None
    scores, mask = added.args[:2]
    capped = _factor(scores, aten.mul.Tensor)
    if capped is None or not isinstance(mask, Node) or not _is(capped[0], aten.tanh.default):
        return None
    inner = _factor(capped[0].args[0], aten.div.Tensor)
    scaled = None if inner is None else _factor(inner[0], aten.mul.Tensor)
    product = inner[0] if inner is not None and scaled is None else scaled and scaled[0]
    if inner is None or inner[1] != capped[1] or not _is(product, aten.matmul.default):
        return None
    query, turned = product.args[:2]
    if not _is(turned, aten.transpose.int) or not isinstance(query, Node):
        return None
    key, value = _unrepeated(turned.args[0]), _unrepeated(node.args[1])
    scale = 1.0 if scaled is None else scaled[1]
    return Site(node, query, key, value, mask, scale, softcap=capped[1])


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target


def _factor(node: Any, target: Any) -> tuple[Node, float] | None:
    """The tensor and the number of a product or quotient of both."""
    if not _is(node, target) or isinstance(node.args[1], Node):
        return None
    return node.args[0], float(node.args[1])


def _unrepeated(node: Any) -> Node:
    """Keys or values before each head was repeated."""
    if _is(node, aten.reshape.default) and _is(node.args[0], aten.expand.default):
        before = node.args[0].args[0]
        if _is(before, aten.unsqueeze.default) and before.args[1] == 2:
            return before.args[0]
    if _is(node, aten.repeat_interleave.self_int) and ops.bind(node)["dim"] == 1:
        return node.args[0]
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


def _agrees(  # noqa: PLR0913  (the case and the claim)
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
