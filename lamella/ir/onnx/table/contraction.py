"""Matrix products."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from lamella.ir.onnx.builder import Builder
from lamella.ir.onnx.table.shapes import permuted
from lamella.ir.onnx.values import Constant, Op, Result, Table, Value

aten = torch.ops.aten


def matmul(g: Builder, op: Op) -> Result:
    """A product; with a weight matrix it is a linear layer with the transposed view of it."""
    return multiplied(g, op[0], op[1])


def multiplied(g: Builder, first: Value, second: Value) -> Any:
    """``first @ second``."""
    if isinstance(first, Node) and isinstance(second, Constant) and g.rank(second) == 2:
        return g.call(aten.linear.default, first, permuted(g, second, [1, 0]))
    return g.call(aten.matmul.default, first, second)


def gemm(g: Builder, op: Op) -> Result:
    """``alpha A B + beta C``, each factor transposed or not."""
    first = permuted(g, op[0], [1, 0]) if op.attribute("transA", 0) else op[0]
    # A linear layer wants [out, in].
    second = op[1] if op.attribute("transB", 0) else permuted(g, op[1], [1, 0])
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


def einsum(g: Builder, op: Op) -> Result:
    """A sum of products by formula."""
    values = [value for value in op.inputs if value is not None]
    return g.call(aten.einsum.default, op.attribute("equation").replace(" ", ""), values)


TABLE: Table = MappingProxyType({"Einsum": einsum, "Gemm": gemm, "MatMul": matmul})
"""ONNX operator -> builder."""
