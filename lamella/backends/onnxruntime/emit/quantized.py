"""Weights of 2, 4 or 8 bits, as the kernels of ONNX Runtime take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.emit import dequantized

lam = torch.ops.lamella

INT8_ACTIVATIONS = 4
"""`accuracy_level` of the kernels that round activations to 8 bits; 0 keeps them."""


def linear_nbits(e: Emission, call: Call) -> ir.Value:
    """`MatMulNBits`, whose packed layout is ours.

    Scales stored as float16 are cast where the model computes in float32; ONNX Runtime folds
    the cast when it loads the model, so that the file is smaller and the kernel is the same.
    """
    if not e.options.contrib:
        return dequantized.linear(e, call)
    x, dtype = call.fake("input"), call.out.dtype
    return e.contrib(
        "MatMulNBits",
        e.tensor(call["input"]),
        e.tensor(call["packed"]),
        e.tensor(call["scales"], dtype),
        e.optional(call["zero_points"]),
        None,
        e.optional(call["bias"], dtype),
        K=int(x.shape[-1]),
        N=int(call.fake("packed").shape[0]),
        bits=int(call["bits"]),
        block_size=int(call["block"]),
        accuracy_level=INT8_ACTIVATIONS if call["int8_activations"] else 0,
    )


def embedding_nbits(e: Emission, call: Call) -> ir.Value:
    """`GatherBlockQuantized`, which reads only the rows that are asked for."""
    if not e.options.contrib:
        return dequantized.embedding(e, call)
    packed, block = call.fake("packed"), int(call["block"])
    rows, blocks, width = (int(size) for size in packed.shape)
    found = e.contrib(
        "GatherBlockQuantized",
        _flat_rows(e, call["packed"], rows, blocks * width),
        e.tensor(call["indices"]),
        e.tensor(call["scales"]),
        e.optional(call["zero_points"]),
        gather_axis=0,
        quantize_axis=1,
        block_size=block,
        bits=int(call["bits"]),
    )
    features = int(call["features"])
    if features == blocks * block:
        return found
    return e.op("Slice", found, e.ints(0), e.ints(features), e.ints(call.out.ndim - 1))


def _flat_rows(e: Emission, packed: Node, rows: int, width: int) -> ir.Value:
    """The codes as one row of bytes per row of the table; a tied head reads the same bytes."""
    key = (packed, "flat rows")
    if key not in e.views:
        e.views[key] = e.op("Reshape", e.tensor(packed), e.ints(rows, width))
    return e.views[key]


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        lam.linear_nbits.default: linear_nbits,
        lam.embedding_nbits.default: embedding_nbits,
    }
)
"""Operator -> emitter."""
