"""Attention between layers of 8-bit integers with static ranges (see `chains`).

It multiplies in bfloat16. Where codes alone are read of it, it gives them; where one product gives
its queries, keys and values and nothing else, it reads them there.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from lamella.backends.torch import chain_kernels as chain
from lamella.backends.torch import native
from lamella.backends.torch.attention import (
    attention,
    attention_codes,
    attention_codes_of_product,
)
from lamella.backends.torch.held import ATTENTION, Lowered
from lamella.ir import ops
from lamella.ir.ops import aten

_VIEWS = (
    aten.slice.Tensor,
    aten.reshape.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
)
"""Operators that compute nothing."""

_RESHAPES = (aten.reshape.default, aten.view.default)


def lower_attention(state: Lowered) -> None:
    """Let attentions multiply in bfloat16, where no position is hidden from another."""
    for node in list(state.module.graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        bound = ops.bind(node)
        if bound["is_causal"] or bound["dropout_p"] or bound["enable_gqa"]:
            continue
        node.target, node.kwargs = attention, {}
        names = ("query", "key", "value", "attn_mask", "scale")
        node.args = tuple(bound[name] for name in names)
        state.counts[ATTENTION] += 1


def ends_in_attention(user: Node, source: Node) -> bool:
    """Whether `source` is read by attention alone, through views."""
    if user.target is attention:
        return source not in user.args[3:]
    return user.target in _VIEWS and all(ends_in_attention(one, user) for one in user.users)


def draw_codes_in(state: Lowered) -> None:
    """Let attention give the codes that alone are read of it."""
    for node in list(state.module.graph.nodes):
        if node.target is not attention:
            continue
        turned = only_user(node)
        flat = None if turned is None else only_user(turned)
        codes = None if flat is None else only_user(flat)
        if turned is None or flat is None or codes is None or codes.target is not chain.codes_of:
            continue
        if turned.target is not aten.transpose.int or set(turned.args[1:]) != {1, 2}:
            continue
        if flat.target not in _RESHAPES:
            continue
        *heads, mask, scale = node.args
        shape: Any = flat.args[1]
        rest = (mask, scale, codes.args[1:])
        found = _one_product(heads, shape)
        if found is None:
            codes.target, codes.args = attention_codes, (tuple(heads), *rest, shape)
        else:
            product, places = found
            codes.target = attention_codes_of_product
            codes.args = (*product.args[:2], places, *rest, tuple(shape[:2]))
        for one in (flat, turned, node):
            one.graph.erase_node(one)
        _erase_unread(heads)
        if found is not None:
            found[0].graph.erase_node(found[0])


def _one_product(heads: list[Any], shape: Any) -> tuple[Node, native.Heads] | None:
    """The product that gives queries, keys and values and nothing else, and where they are in it.

    Each of them is a slice of its outputs, seen as ``[batch, positions, heads, width]`` and turned;
    `shape`, what the result is seen as, has the same batch and positions.
    """
    views = [_sources(turned, 3) for turned in heads]
    places = [_place(view, shape) for view in views]
    product = views[0][-1]
    if None in places or any(view[-1] is not product for view in views):
        return None
    arguments: Any = product.args
    _, _, outputs, output, _ = arguments
    if len(product.users) != len(heads) or output[0] != "bfloat16":
        return None
    starts, counts, widths = zip(*(one for one in places if one is not None), strict=True)
    if len(set(counts)) > 1 or len(set(widths)) > 1 or widths[0] % native.LANES:
        return None
    return product, (outputs, (starts[0], starts[1], starts[2]), counts[0], widths[0])


def _place(view: list[Node], shape: Any) -> tuple[int, int, int] | None:
    """Where heads begin in a product, how many, and how wide they are; None for other views."""
    if len(view) != 4:
        return None
    turned, split, part, whole = view
    kinds = (turned.target, part.target, whole.target)
    if kinds != (aten.transpose.int, aten.slice.Tensor, native.product):
        return None
    sizes: Any = split.args[1]
    if split.target not in _RESHAPES or set(turned.args[1:]) != {1, 2} or len(part.args) != 4:
        return None
    if len(sizes) != 4 or len(shape) != 3 or list(sizes[:2]) != list(shape[:2]):
        return None
    arguments: tuple[Any, ...] = part.args
    _, axis, start, end = arguments
    width = sizes[3]
    if axis != -1 or not isinstance(width, int) or (end - start) % width:
        return None
    return start, (end - start) // width, width


def _sources(node: Node, count: int) -> list[Node]:
    """A node, and the first arguments from it on."""
    found = [node]
    while len(found) <= count and found[-1].args and isinstance(found[-1].args[0], Node):
        found.append(found[-1].args[0])
    return found


def _erase_unread(nodes: list[Any]) -> None:
    """Erase views that nothing reads any more, and what they alone read."""
    for node in dict.fromkeys(nodes):
        for one in _sources(node, 2):
            if not one.users and one.target in _VIEWS:
                one.graph.erase_node(one)


def only_user(node: Node) -> Node | None:
    """The one node that reads another; None where there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None
