"""Chains of layers of 8-bit integers with static ranges: what runs between them is part of them.

Layers that read the same codes become one product. An activation behind a product is applied by
it, a residual is added by it, and where only one other layer reads the result, the product gives
its codes. Attention multiplies in bfloat16, and products give that where nothing else reads them.
All of it is for who asks for approximations (see `Kernels.bfloat16`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.backends.torch import chain_kernels as chain
from lamella.backends.torch import kernels
from lamella.backends.torch.attention import attention
from lamella.backends.torch.held import ATTENTION, INTEGERS, Lowered, held, read
from lamella.ir import ops
from lamella.ir.ops import aten, lam

_VIEWS = (
    aten.slice.Tensor,
    aten.reshape.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
)
"""Operators that compute nothing."""

_OUTPUT, _ACTIVATION, _OTHER = 5, 6, 7
"""Places of the arguments of a product that are changed when something is drawn into it."""


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


def lower_chains(state: Lowered) -> None:
    """Replace the layers with static ranges by products, and draw into these what they can do."""
    products = [_merged(state, layers) for layers in _readers(state)]
    for node in products:
        _draw_activation(node)
        _draw_sum(node)
    for node in products:
        _narrow(node)


def _readers(state: Lowered) -> Iterator[list[Node]]:
    """The layers that read the same codes, in the order of the graph."""
    found: dict[tuple[Any, float, int], list[Node]] = {}
    for node in state.module.graph.nodes:
        if node.target is lam.linear_int8_static.default:
            bound = ops.bind(node)
            key = (bound["input"], float(bound["step"]), int(bound["zero"]))
            found.setdefault(key, []).append(node)
    yield from found.values()


def _merged(state: Lowered, layers: list[Node]) -> Node:
    """One product for some layers that read the same codes, whose results are parts of its."""
    graph, bound = state.module.graph, [ops.bind(layer) for layer in layers]
    weights, scales, biases = (
        [None if one[name] is None else read(state.module, one[name]) for one in bound]
        for name in ("weight", "scales", "bias")
    )
    sizes = [one.shape[0] for one in weights if one is not None]
    name = f"{bound[0]['weight'].target}_chain"
    key = tuple(one["weight"] for one in bound)
    operands = (
        held(state, (*key, INTEGERS), f"{name}_packed", lambda: _packed(weights)),
        held(state, (*key, "scales"), f"{name}_scales", lambda: _joined(scales, sizes)),
        held(state, (*key, "bias"), f"{name}_bias", lambda: _joined(biases, sizes)),
    )
    grid = (float(bound[0]["step"]), int(bound[0]["zero"]))
    with graph.inserting_before(layers[0]):
        codes = graph.call_function(chain.codes_of, (bound[0]["input"], *grid))
        arguments = (codes, *operands, grid, chain.FLOAT, chain.NONE, None)
        result = graph.call_function(chain.product, arguments)
    state.counts[INTEGERS] += len(layers)
    for layer, part in zip(layers, _parts(result, layers[0], sizes), strict=True):
        layer.replace_all_uses_with(part)
    for layer in layers:
        graph.erase_node(layer)
    return result


def _parts(result: Node, place: Node, sizes: list[int]) -> list[Node]:
    """The parts of a product, one after the other along its last axis; made before `place`."""
    if len(sizes) == 1:
        return [result]
    ends = list(itertools.accumulate(sizes))
    with place.graph.inserting_before(place):
        return [
            place.graph.call_function(aten.slice.Tensor, (result, -1, end - size, end))
            for end, size in zip(ends, sizes, strict=True)
        ]


def _packed(weights: list[Tensor | None]) -> Tensor:
    return kernels.packed_integers(torch.cat([one for one in weights if one is not None]))


def _joined(parts: list[Tensor | None], sizes: list[int]) -> Tensor:
    """Vectors one after the other, zeros for those that are None."""
    pairs = zip(parts, sizes, strict=True)
    return torch.cat([torch.zeros(size) if one is None else one.float() for one, size in pairs])


def _draw_activation(product: Node) -> None:
    """Let a product apply the activation that alone reads it."""
    reader = _only_user(product)
    if reader is None:
        return
    if reader.target is aten.gelu.default:
        tanh = ops.bind(reader)["approximate"] == "tanh"
        name = chain.GELU_TANH if tanh else chain.GELU
    elif reader.target is aten.relu.default:
        name = chain.RELU
    else:
        return
    _draw(product, reader, _ACTIVATION, name)


def _draw_sum(product: Node) -> None:
    """Let a product add what is alone added to it; it is read where the sum was."""
    reader = _only_user(product)
    if reader is None or reader.target is not aten.add.Tensor:
        return
    bound = ops.bind(reader)
    others = [one for one in (bound["self"], bound["other"]) if one is not product]
    plain = len(others) == 1 and isinstance(others[0], Node) and bound["alpha"] == 1
    if plain and product.args[_ACTIVATION] == chain.NONE:
        # What is added may be computed after the product.
        reader.prepend(product)
        _draw(product, reader, _OTHER, others[0])


def _narrow(product: Node) -> None:
    """Let a product give codes or bfloat16 where nothing else is read of it."""
    reader = _only_user(product)
    if product.args[_OTHER] is not None:
        return
    if reader is not None and reader.target is chain.codes_of:
        _draw(product, reader, _OUTPUT, ("codes", *reader.args[1:]))
    elif all(_ends_in_attention(user, product) for user in product.users):
        product.update_arg(_OUTPUT, ("bfloat16", 1.0, 0))


def _ends_in_attention(user: Node, source: Node) -> bool:
    """Whether `source` is read by attention alone, through views."""
    if user.target is attention:
        return source not in user.args[3:]
    return user.target in _VIEWS and all(_ends_in_attention(one, user) for one in user.users)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _draw(product: Node, reader: Node, place: int, value: Any) -> None:
    """Put `value` into a product, which then gives what `reader` gave."""
    reader.replace_all_uses_with(product)
    reader.graph.erase_node(reader)
    product.update_arg(place, value)
