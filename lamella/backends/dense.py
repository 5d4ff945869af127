"""Layers of few bits as layers of floats: what runs where their kernel is not to be used.

Weights are those that the codes stand for, exactly; what a kernel rounds of its input is not
rounded. Files hold the floats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.packing import dequantize

Bound = Mapping[str, Any]


def make_dense(graph: Graph, node: Node) -> int:
    """Let a layer of few bits read a weight of floats.

    Args:
        graph: Is changed; `Graph.finish` forgets codes that nothing reads any more.
        node: A layer of one of the operators of few bits.

    Returns:
        Bytes of a weight that was made for it; 0 if another layer had it made.

    Raises:
        KeyError: The operator is another one.
    """
    bytes_before = graph.weight_bytes()
    made = _RULES[node.target](graph, node, ops.bind(node))
    graph.replace(node, made)
    return graph.weight_bytes() - bytes_before


def _linear_nbits(graph: Graph, node: Node, bound: Bound) -> Node:
    width = int(bound["input"].meta["val"].shape[-1])
    weight = _of_codes(graph, node, bound, width)
    inputs = (bound["input"], weight, bound["bias"])
    return graph.call(aten.linear.default, *inputs, before=node)


def _embedding_nbits(graph: Graph, node: Node, bound: Bound) -> Node:
    table = _of_codes(graph, node, bound, int(bound["features"]))
    return graph.call(aten.embedding.default, table, bound["indices"], before=node)


def _linear_int8(graph: Graph, node: Node, bound: Bound) -> Node:
    weight = _of_integers(graph, node, bound)
    inputs = (bound["input"], weight, bound["bias"])
    return graph.call(aten.linear.default, *inputs, before=node)


def _conv_int8(graph: Graph, node: Node, bound: Bound) -> Node:
    weight = _of_integers(graph, node, bound)
    names = ("bias", "stride", "padding", "dilation", "groups")
    target = aten.conv1d.default if weight.meta["val"].ndim == 3 else aten.conv2d.default
    inputs = (bound["input"], weight, *(bound[name] for name in names))
    found = graph.call(target, *inputs, before=node)
    # A range of outputs that begins at zero stands for a rectifier.
    return graph.call(aten.relu.default, found, before=node) if bound["out_zero"] == 0 else found


def _of_codes(graph: Graph, node: Node, bound: Bound, width: int) -> Node:
    dtype = node.meta["val"].dtype
    operands = [bound[name] for name in ("packed", "scales", "zero_points")]

    def make() -> Tensor:
        packed, scales, zeros = (None if o is None else graph.weight(o) for o in operands)
        assert packed is not None
        assert scales is not None
        wide = scales.to(torch.promote_types(scales.dtype, torch.float32))
        return dequantize(packed, wide, zeros, bound["bits"], bound["block"], width).to(dtype)

    return _held(graph, f"{operands[0].target}_as_{str(dtype).removeprefix('torch.')}", make)


def _of_integers(graph: Graph, node: Node, bound: Bound) -> Node:
    codes, scales = bound["weight"], bound["scales"]
    dtype = node.meta["val"].dtype

    def make() -> Tensor:
        whole = graph.weight(codes)
        factors = graph.weight(scales).reshape(-1, *[1] * (whole.ndim - 1))
        return (whole * factors).to(dtype)

    return _held(graph, f"{codes.target}_as_{str(dtype).removeprefix('torch.')}", make)


def _held(graph: Graph, name: str, make: Callable[[], Tensor]) -> Node:
    """The weight of that name, made unless there is one."""
    held = [node for node in graph.weight_nodes() if node.target == name]
    return held[0] if held else graph.add_weight(name, make())


_RULES: Mapping[Any, Callable[[Graph, Node, Bound], Node]] = MappingProxyType(
    {
        lam.linear_nbits.default: _linear_nbits,
        lam.embedding_nbits.default: _embedding_nbits,
        lam.linear_int8.default: _linear_int8,
        lam.linear_int8_static.default: _linear_int8,
        lam.conv_int8.default: _conv_int8,
    }
)
"""Operator -> the layer of floats in its place."""
