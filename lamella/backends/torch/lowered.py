"""The module that PyTorch runs: operators of few bits in terms of the kernels that there are.

There is no kernel for the packed layout: unpacking in every call would cost more than the layer
itself. So a weight is unpacked once and held as it is computed with, or packed anew for the
kernels of `lamella.backends.torch.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from lamella.backends.torch import kernels, wide
from lamella.backends.torch.chain_attention import lower_attention
from lamella.backends.torch.chains import lower_chains
from lamella.backends.torch.held import (
    BFLOAT16,
    INT4,
    INT8,
    INTEGERS,
    TRACED,
    UNPACKED,
    Kernels,
    Lowered,
    held,
    read,
)
from lamella.errors import ArtifactError
from lamella.ir import ops
from lamella.ir.integer_operators import conv_int8, linear_int8_static
from lamella.ir.operators import linear_int8
from lamella.ir.packing import dequantize, unpack

aten = torch.ops.aten
lam = torch.ops.lamella


def lowered(module: fx.GraphModule, allowed: Kernels | None = None) -> Lowered:
    """Replace the operators of few bits in `module`, and forget the weights they read."""
    state = Lowered(module, allowed or Kernels())
    rules: dict[Any, Callable[[Lowered, Node], None]] = {
        lam.linear_nbits.default: _linear_nbits,
        lam.linear_int8.default: _linear_int8,
        lam.linear_int8_static.default: _linear_int8_static,
        lam.conv_int8.default: _conv_int8,
        lam.embedding_nbits.default: _embedding_nbits,
    }
    if state.kernels.bfloat16:
        rules[aten.linear.default] = _linear
        lower_attention(state)
        if state.kernels.integers == "onednn":
            lower_chains(state)
    for node in list(module.graph.nodes):
        if node.target in rules:
            rules[node.target](state, node)
    remove_unread_weights(module)
    module.recompile()
    return state


# ---- operators ------------------------------------------------------------------------------


def _linear_nbits(state: Lowered, node: Node) -> None:
    bound = ops.bind(node)
    operands = (bound["packed"], bound["scales"], bound["zero_points"])
    if state.kernels.bfloat16:
        _linear_nbits_in_bfloat16(state, node, bound)
        return
    grid = (bound["bits"], bound["block"])
    block = bound["block"] if bound["int8_activations"] else 0
    weight = _dense(state, operands, grid, None)
    _swap(node, wide.linear, (bound["input"], weight, bound["bias"], block))
    state.counts[UNPACKED] += 1


def _linear_nbits_in_bfloat16(state: Lowered, node: Node, bound: dict[str, Any]) -> None:
    operands = (bound["packed"], bound["scales"], bound["zero_points"])
    bits, block = int(bound["bits"]), int(bound["block"])
    codes, scales, zeros = _read_all(state.module, operands)
    if bits != 4 or block not in kernels.INT4_BLOCKS or kernels.int4_obstacle(codes.shape[0]):
        weight = _dense(state, operands, (bits, block), None, torch.bfloat16)
        _swap(node, kernels.linear_bfloat16, (bound["input"], weight, bound["bias"]))
        state.counts[BFLOAT16] += 1
        return

    def packed() -> Tensor:
        return kernels.packed_int4(unpack(codes, 4, block).flatten(1))

    def slopes() -> Tensor:
        known = None if zeros is None else unpack(zeros, 4, scales.shape[-1])
        return kernels.slopes_and_offsets(scales, known)

    name = str(bound["packed"].target)
    made = (
        held(state, (*operands, bits, block, INT4), f"{name}_int4", packed),
        held(state, (*operands, bits, block, "slopes"), f"{name}_slopes", slopes),
    )
    _swap(node, kernels.linear_int4, (bound["input"], *made, bound["bias"], block))
    state.counts[INT4] += 1


def _linear_int8(state: Lowered, node: Node) -> None:
    bound = ops.bind(node)
    input, weight, scales, bias, per_row = bound.values()
    codes = read(state.module, weight)
    if state.kernels.integers == "onednn":
        target = kernels.linear_rows if per_row else kernels.linear_tensor
        _swap(node, target, (input, _integers(state, weight), scales, bias))
    elif state.kernels.integers == "traced":
        target = kernels.traced_rows if per_row else kernels.traced_tensor
        _swap(node, target, (input, *_columns(state, weight), scales, bias))
    elif state.kernels.bfloat16 and not kernels.int8_obstacle(*codes.shape):
        _swap(node, kernels.linear_int8_weights, (input, weight, scales, bias))
        state.counts[INT8] += 1
    else:
        _swap(node, linear_int8, (input, _wide(state, weight), scales, bias, per_row))


def _linear_int8_static(state: Lowered, node: Node) -> None:
    input, weight, *rest = ops.bind(node).values()
    if state.kernels.integers == "onednn":
        _swap(node, kernels.linear_static, (input, _integers(state, weight), *rest))
    elif state.kernels.integers == "traced":
        _swap(node, kernels.traced_static, (input, *_columns(state, weight), *rest))
    else:
        _swap(node, linear_int8_static, (input, _wide(state, weight), *rest))


def _conv_int8(state: Lowered, node: Node) -> None:
    input, weight, *rest = ops.bind(node).values()
    _swap(node, conv_int8, (input, _wide(state, weight), *rest))


def _embedding_nbits(state: Lowered, node: Node) -> None:
    bound = ops.bind(node)
    operands = (bound["packed"], bound["scales"], bound["zero_points"])
    table = _dense(state, operands, (bound["bits"], bound["block"]), bound["features"])
    _swap(node, aten.embedding.default, (table, bound["indices"]))
    state.counts[UNPACKED] += 1


def _linear(state: Lowered, node: Node) -> None:
    """A linear layer of floats whose weight is constant."""
    input, weight, bias = (ops.bind(node)[name] for name in ("input", "weight", "bias"))
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return
    if read(state.module, weight).dtype is not torch.float32:
        return
    name = f"{weight.target}_bfloat16"
    made = held(state, (weight, BFLOAT16), name, read(state.module, weight).bfloat16)
    _swap(node, kernels.linear_bfloat16, (input, made, bias))
    state.counts[BFLOAT16] += 1


# ---- weights --------------------------------------------------------------------------------


def remove_unread_weights(module: fx.GraphModule) -> None:
    """Remove the readers of weights that nothing uses, and the weights."""
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_buffers() if name not in read]:
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)


def _dense(
    state: Lowered,
    operands: tuple[Any, Any, Any],
    grid: tuple[int, int],
    features: int | None,
    dtype: torch.dtype | None = None,
) -> Node:
    """The node that reads a dense weight; layers that share codes share it.

    Args:
        state: Holds it.
        operands: Nodes of codes, scales and zeros.
        grid: Bits and block.
        features: Width of a table; None for a linear layer, which multiplies in float32 and may
            be given whole blocks.
        dtype: Another than that of the scales.
    """
    key = (*operands, *grid, features, dtype, UNPACKED)

    def make() -> Tensor:
        codes, scales, zeros = _read_all(state.module, operands)
        if features is None:
            scales = scales.to(torch.promote_types(scales.dtype, torch.float32))
        width = codes.shape[-2] * grid[1] if features is None else features
        value = dequantize(codes, scales, zeros, *grid, width)
        return value if dtype is None else value.to(dtype)

    return held(state, key, f"{operands[0].target}_dense{len(state.held)}", make)


def _wide(state: Lowered, weight: Node) -> Node:
    """The node that reads codes of integers as float32."""
    name = f"{weight.target}_dense{len(state.held)}"
    state.counts[UNPACKED] += 1
    return held(state, (weight, UNPACKED), name, read(state.module, weight).float)


def _integers(state: Lowered, weight: Node) -> Node:
    """The node that reads codes of integers as oneDNN wants them."""
    codes = read(state.module, weight)
    state.counts[INTEGERS] += 1
    make = lambda: kernels.packed_integers(codes)  # noqa: E731  (a name would say no more)
    return held(state, (weight, INTEGERS), f"{weight.target}_packed", make)


def _columns(state: Lowered, weight: Node) -> tuple[Node, Node]:
    """The nodes that read codes of integers column by column, and their sums."""
    columns, sums = kernels.packed_columns(read(state.module, weight))
    state.counts[TRACED] += 1
    return (
        held(state, (weight, TRACED), f"{weight.target}_columns", lambda: columns),
        held(state, (weight, "sums"), f"{weight.target}_sums", lambda: sums),
    )


def _read_all(
    module: fx.GraphModule, operands: tuple[Any, Any, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, scales, zeros = (None if o is None else read(module, o) for o in operands)
    if codes is None or scales is None:
        raise ArtifactError(f"a layer of few bits has no codes or no scales ({operands})")
    return codes, scales, zeros


def _swap(node: Node, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Let `node` call another function."""
    node.target, node.args, node.kwargs = target, args, {}
