"""Weights of few bits in standard ONNX: blocked `DequantizeLinear`, then the dense operator.

Any runtime of opset 21 can run it; types of 2 bits need opset 25. ONNX Runtime turns the form for
linear layers into `MatMulNBits` with 8-bit activations when it loads the model.
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

_KINDS = {
    2: (ir.DataType.INT2, ir.DataType.UINT2),
    4: (ir.DataType.INT4, ir.DataType.UINT4),
    8: (ir.DataType.INT8, ir.DataType.UINT8),
}
_TWO_BITS = 25
"""The first version of the standard operators with types of 2 bits."""

TWO_BIT_OUTPUTS = 4
"""Of a matrix whose outputs are no multiple of this ONNX Runtime 1.31 makes another one when it
fuses codes of 2 bits; such codes are stored in 4."""


def weight(e: Emission, call: Call) -> ir.Value:
    """The dense matrix itself, ``[out, in]``."""
    bits = int(call["bits"])
    codes = _Codes(call, int(call["features"]), bits, int(call["block"]), bits)
    return _matrix(e, codes, transposed=False)


@dataclass(frozen=True)
class _Codes:
    """The codes of a matrix ``[rows, width]`` and how they are grouped.

    Attributes:
        call: The layer.
        width: Entries of a row.
        bits: Of a code in the graph.
        block: Entries that share a scale.
        held: Bits of a code in the file.
    """

    call: Call
    width: int
    bits: int
    block: int
    held: int

    @property
    def symmetric(self) -> bool:
        """Without zero points the codes are signed around zero."""
        return self.call["zero_points"] is None

    @property
    def kind(self) -> ir.DataType:
        """The ONNX type that holds a code."""
        signed, unsigned = _KINDS[self.held]
        return signed if self.symmetric else unsigned


def linear(e: Emission, call: Call) -> ir.Value:
    """The matrix as ``[in, out]`` with blocks along its first axis, which ONNX Runtime fuses.

    Of a product with two axes, a bias and an activation ONNX Runtime makes a `FusedGemm` first,
    which dequantizes in every call; with three axes it does not.
    """
    outputs, bits = int(call.fake("packed").shape[0]), int(call["bits"])
    held = 4 if bits == 2 and outputs % TWO_BIT_OUTPUTS else bits
    codes = _Codes(call, int(call.fake("input").shape[-1]), bits, int(call["block"]), held)
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
    bits = int(call["bits"])
    codes = _Codes(call, int(call["features"]), bits, int(call["block"]), bits)
    table = _matrix(e, codes, transposed=False)
    return e.op("Gather", table, e.tensor(call["indices"]), axis=0)


def _matrix(e: Emission, codes: _Codes, *, transposed: bool) -> ir.Value:
    call, dtype = codes.call, codes.call.out.dtype
    if codes.held == 2:
        e.least_opset = _TWO_BITS
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
