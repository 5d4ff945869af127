"""Matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.quantized import Quantized
from lamella.ir.onnx.table.shapes import permuted
from lamella.ir.onnx.values import Constant, Op, Result, Table, Value

aten = torch.ops.aten
lam = torch.ops.lamella


def matmul(g: Builder, op: Op) -> Result:
    """A product; with a weight matrix it is a linear layer with the transposed view of it."""
    return multiplied(g, op[0], op[1])


def multiplied(g: Builder, first: Value, second: Value) -> Any:
    """``first @ second``."""
    if isinstance(first, Node) and isinstance(second, Quantized) and second.fits_linear(0):
        return linear_of_codes(g, first, second, 0)
    second = g.constant(second) if isinstance(second, Quantized) else second
    if isinstance(first, Node) and isinstance(second, Constant) and g.rank(second) == 2:
        return g.call(aten.linear.default, first, permuted(g, second, [1, 0]))
    return g.call(aten.matmul.default, first, second)


def linear_of_codes(g: Builder, value: Value, weight: Quantized, axis: int) -> Any:
    """A linear layer whose weight stays packed; `axis` of the matrix is summed over."""
    names = ("packed", "scales", "zero_points")
    packed = [
        None if data is None else Constant(data, f"{weight.name}.{name}")
        for name, data in zip(names, weight.packed(axis), strict=True)
    ]
    rest = (None, weight.bits, weight.block, False)
    return g.call(lam.linear_nbits.default, value, *packed, *rest)


def gemm(g: Builder, op: Op) -> Result:
    """``alpha A B + beta C``, each factor transposed or not."""
    first, second = op[0], op[1]
    if op.attribute("transA", 0):
        first = permuted(g, first, [1, 0])
    second = g.constant(second) if isinstance(second, Quantized) else second
    # A linear layer wants [out, in].
    if not op.attribute("transB", 0):
        second = permuted(g, second, [1, 0])
    bias = op.optional(2)
    alpha, beta = op.attribute("alpha", 1.0), op.attribute("beta", 1.0)
    features = g.static(second, 0)
    if isinstance(second, Constant) and _is_bias(g, bias, features) and alpha == beta == 1.0:
        flat = None if bias is None else g.call(aten.reshape.default, bias, [features])
        return g.call(aten.linear.default, first, second, flat)
    if isinstance(second, Constant):
        product = g.call(aten.linear.default, first, second)
    else:
        product = g.call(aten.matmul.default, first, permuted(g, second, [1, 0]))
    if alpha != 1.0:
        product = g.call(aten.mul.Tensor, product, alpha)
    if bias is None or beta == 0.0:
        return product
    scaled = bias if beta == 1.0 else g.call(aten.mul.Tensor, bias, beta)
    return g.call(aten.add.Tensor, product, scaled)


def _is_bias(g: Builder, bias: Value | None, features: int | None) -> bool:
    if bias is None:
        return True
    sizes = g.shape(bias)
    return isinstance(bias, Constant) and bool(sizes) and g.product(sizes) == sizes[-1] == features


def grouped_linear(g: Builder, rows: Value, offsets: Value, matrices: Sequence[Value]) -> Any:
    """Linear layers of experts over rows sorted by expert.

    Args:
        g: Builder.
        rows: ``[rows, in]``.
        offsets: Where the rows of each expert end, ``[experts]``.
        matrices: ``[in, out]`` for each expert.
    """
    turned = [permuted(g, matrix, [1, 0]) for matrix in matrices]
    known = [matrix for matrix in turned if isinstance(matrix, Constant)]
    if len(known) == len(turned):
        name = known[0].name.removesuffix(".0")
        stacked: Value = Constant(torch.stack([matrix.tensor for matrix in known]), name)
    else:
        stacked = g.call(aten.stack.default, turned, 0)
    return g.call(lam.grouped_linear.default, rows, stacked, offsets)


def fused_matmul(g: Builder, op: Op) -> Result:
    """``alpha A B``, each factor with its last axes swapped or not (ONNX Runtime)."""
    op.need(not op.attribute("transBatchA", 0), "a swapped batch axis")
    op.need(not op.attribute("transBatchB", 0), "a swapped batch axis")
    first, second = (
        _swapped(g, op[place]) if op.attribute(name, 0) else op[place]
        for place, name in enumerate(("transA", "transB"))
    )
    product = multiplied(g, first, second)
    alpha = op.attribute("alpha", 1.0)
    return product if alpha == 1.0 else g.call(aten.mul.Tensor, product, alpha)


def _swapped(g: Builder, value: Value) -> Any:
    rank = g.rank(value)
    return permuted(g, value, [*range(rank - 2), rank - 1, rank - 2])


def einsum(g: Builder, op: Op) -> Result:
    """A sum of products by formula."""
    values = [value for value in op.inputs if value is not None]
    return g.call(aten.einsum.default, op.attribute("equation").replace(" ", ""), values)


TABLE: Table = MappingProxyType({"Einsum": einsum, "Gemm": gemm, "MatMul": matmul})
"""ONNX operator -> builder."""
