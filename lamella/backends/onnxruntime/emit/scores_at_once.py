"""Attention over a cache of floats that computes all scores of a head at once.

ONNX Runtime's `GroupQueryAttention` goes over the cache tile by tile, which needs no room for
the scores. For one new token that is slow: its scores are a row. It leaves the tiles when there
is an attention sink, and one of weight zero changes nothing; the product of one query and the
keys then has a kernel of its own, which the runtime takes when no factor is asked for, so that
the queries come scaled. With 12 heads of 64 channels, one token over 128 / 960 / 7,900 rows takes
0.65 / 0.61 / 0.53 of the time (ONNX Runtime 1.31, two cores), 512 new tokens 0.8 to 1.05 of it; a
prompt of more than a thousand tokens in one call is slower, by 0.4 at 2,048.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node

from lamella.backends.onnxruntime.emission import MICROSOFT, Caches, Call, Emission
from lamella.backends.onnxruntime.emit.rotary_tables import longest_of

lam = torch.ops.lamella

_MOST_BYTES = 2**28
"""What the scores of a prompt that is read in one call may take."""


def is_fit(e: Emission, call: Call) -> bool:
    """Whether an attention reads floats, and its scores have room.

    They have in `Caches.BOUND`: those of `counts.CHUNK` tokens take about as much as the cache.
    """
    if call["key_scale"] is not None:
        return False
    longest = longest_of(e.graph)
    whole_prompt = 4 * int(call.fake("query").shape[1]) * longest**2
    return e.options.caches is Caches.BOUND or whole_prompt <= _MOST_BYTES


def weightless_sink(e: Emission, call: Call) -> ir.Value:
    """A sink for each head, whose exponential is zero."""
    return e.const(np.full(int(call.fake("query").shape[1]), -np.inf, np.float32))


def scaled_queries(e: Emission, call: Call, taken: list[ir.Value | None]) -> list[ir.Value | None]:
    """Queries, keys and values as the operator takes them, with the queries scaled.

    Args:
        e: Where it is written.
        call: The attention.
        taken: Queries, keys and values apart, or side by side as the first of three.
    """
    scale, (whole, *others) = float(call["scale"]), taken
    assert whole is not None
    if scale == 1:
        return taken
    # Apart, only the queries are touched; side by side, keys and values come along.
    names = ("query",) if others[0] is not None else ("query", "key", "value")
    sizes = [_channels(call, name) for name in names]
    factors = np.repeat(np.array([scale, 1, 1], np.float32)[: len(sizes)], sizes)
    codes = whole.producer()
    alone = all(_is_read_once(call[name]) for name in names)
    if codes is None or codes.op_type != "MatMulNBits" or not alone:
        return [e.op("Mul", whole, e.const(factors)), *others]
    return [_from_scaled_codes(e, codes, factors), *others]


def _from_scaled_codes(e: Emission, product: ir.Node, factors: np.ndarray) -> ir.Value:
    """The product again, with the factors in its scales: computed when the model is loaded."""
    inputs = list(product.inputs)
    for place, shape in ((2, (-1, 1)), (5, (-1,))):
        if place < len(inputs) and inputs[place] is not None:
            inputs[place] = e.op("Mul", inputs[place], e.const(factors.reshape(shape)))
    attributes = {name: value.value for name, value in product.attributes.items()}
    return e.add("MatMulNBits", inputs, attributes, domain=MICROSOFT)[0]


def _channels(call: Call, name: str) -> int:
    _, heads, _, width = call.fake(name).shape
    return int(heads) * int(width)


def _is_read_once(node: Node) -> bool:
    """Whether it is all that is made of a product: without factors that is not written then."""
    while len(node.users) == 1 and node.all_input_nodes:
        if node.target is lam.linear_nbits.default:
            return True
        node = node.all_input_nodes[0]
    return False
