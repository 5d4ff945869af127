"""Weights of few bits in standard ONNX: blocked `DequantizeLinear`, then the dense operator.

Any runtime of opset 21 can run it. ONNX Runtime turns the form for linear layers into
`MatMulNBits` with 8-bit activations when it loads the model. There is no type of 2 bits before
opset 25, so that such codes take 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call, Emission
from lamella.ir.packing import unpack


def weight(e: Emission, call: Call) -> ir.Value:
    """The dense matrix itself, ``[out, in]``."""
    codes = _Codes(call, int(call["features"]), int(call["bits"]), int(call["block"]))
    return _matrix(e, codes, transposed=False)


@dataclass(frozen=True)
class _Codes:
    """The codes of a matrix ``[rows, width]`` and how they are grouped."""

    call: Call
    width: int
    bits: int
    block: int

    @property
    def symmetric(self) -> bool:
        """Without zero points the codes are signed around zero."""
        return self.call["zero_points"] is None

    @property
    def kind(self) -> ir.DataType:
        """The ONNX type that holds a code."""
        if self.bits == 8:
            return ir.DataType.INT8 if self.symmetric else ir.DataType.UINT8
        return ir.DataType.INT4 if self.symmetric else ir.DataType.UINT4


def linear(e: Emission, call: Call) -> ir.Value:
    """The matrix as ``[in, out]`` with blocks along its first axis, which ONNX Runtime fuses.

    Of a product with two axes, a bias and an activation ONNX Runtime makes a `FusedGemm` first,
    which dequantizes in every call; with three axes it does not.
    """
    codes = _Codes(call, int(call.fake("input").shape[-1]), int(call["bits"]), int(call["block"]))
    x, bias = e.tensor(call["input"]), e.optional(call["bias"])
    matrix = _matrix(e, codes, transposed=True)
    if bias is None:
        return e.op("MatMul", x, matrix)
    if call.out.ndim != 2:
        return e.op("Add", e.op("MatMul", x, matrix), bias)
    product = e.op("MatMul", e.op("Unsqueeze", x, e.ints(0)), matrix)
    return e.op("Squeeze", e.op("Add", product, bias), e.ints(0))


def embedding(e: Emission, call: Call) -> ir.Value:
    """Rows of the dense table."""
    codes = _Codes(call, int(call["features"]), int(call["bits"]), int(call["block"]))
    table = _matrix(e, codes, transposed=False)
    return e.op("Gather", table, e.tensor(call["indices"]), axis=0)


def _matrix(e: Emission, codes: _Codes, *, transposed: bool) -> ir.Value:
    call, dtype = codes.call, codes.call.out.dtype
    packed = call["packed"]
    key = (packed, f"dense {transposed}")
    # ONNX Runtime fuses a weight with one reader only, so that only tables are shared.
    if key in e.views and not transposed:
        return e.views[key]
    zeros = None
    if not codes.symmetric:
        zeros = _stored(e, codes, call["zero_points"], transposed)
    scales = e.tensor(call["scales"], dtype)
    if transposed:
        scales = e.op("Transpose", scales, perm=[1, 0])
    inputs = (_stored(e, codes, packed, transposed), scales, zeros)
    axis = 0 if transposed else 1
    e.views[key] = e.op("DequantizeLinear", *inputs, axis=axis, block_size=codes.block)
    return e.views[key]


def _stored(e: Emission, codes: _Codes, node: Node, transposed: bool) -> ir.Value:
    """Codes or zero points, unpacked from our layout and packed into ONNX's when written."""
    rows = int(node.meta["val"].shape[0])
    blocks = int(codes.call.fake("scales").shape[-1])
    count = codes.width if node is codes.call["packed"] else blocks
    shape = (count, rows) if transposed else (rows, count)
    name = e.unique(f"{node.target}.{'t' if transposed else 'codes'}")

    def read() -> ir.TensorProtocol:
        values = unpack(_rows_of(e.graph.weight(node)), codes.bits, count)
        values = values.t() if transposed else values
        if codes.symmetric:
            values = values.to(torch.int16) - (1 << (codes.bits - 1))
        array = values.numpy().astype(codes.kind.numpy())
        return ir.Tensor(np.ascontiguousarray(array), dtype=codes.kind, name=name)

    return e.initializer(ir.LazyTensor(read, codes.kind, ir.Shape(shape), name=name))


def _rows_of(packed: Tensor) -> Tensor:
    """Bytes in rows: blocks are whole bytes and follow each other."""
    return packed.flatten(1)
