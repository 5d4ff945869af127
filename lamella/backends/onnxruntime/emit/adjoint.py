"""Operators that only the adjoints of others need: sums by index, winners, scans, dense weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.emit import dequantized

aten = torch.ops.aten
lam = torch.ops.lamella


def scatter_add(e: Emission, call: Call) -> ir.Value:
    """The tensor with numbers added at places along an axis; a place may occur twice."""
    operands = (e.tensor(call[name]) for name in ("self", "index", "src"))
    return e.op("ScatterElements", *operands, axis=call.axis(), reduction="add")


def threshold_backward(e: Emission, call: Call) -> ir.Value:
    """The first operand where the second is above a number, else zero."""
    dtype = call.out.dtype
    bound = e.const(float(call["threshold"]), dtype)
    above = e.op("Greater", e.tensor(call["self"], dtype), bound)
    return e.op("Where", above, e.tensor(call["grad_output"], dtype), e.const(0.0, dtype))


def max_pool2d_with_indices(e: Emission, call: Call) -> tuple[ir.Value, ...]:
    """The winners of windows, and their places in the image of their channel."""
    size, stride, padding, dilation = (
        _pair(call[name]) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    source = call["self"]
    values, places = e.add(
        "MaxPool",
        (e.tensor(source),),
        {
            "kernel_shape": size,
            "strides": stride or size,
            "pads": padding * 2,
            "dilations": dilation,
            "ceil_mode": int(call["ceil_mode"]),
        },
        outputs=2,
    )
    # ONNX counts through the whole tensor, PyTorch through each image.
    entries = e.op("Mul", e.size(source, -2), e.size(source, -1))
    return values, e.op("Mod", places, entries)


def _pair(given: Any) -> list[int]:
    listed = [int(given)] if isinstance(given, int) else [int(one) for one in given]
    return listed * 2 if len(listed) == 1 else listed


def linear_scan(e: Emission, call: Call) -> ir.Value:
    """A `Scan` over the sequence that keeps every state."""
    dtype = call.out.dtype
    update = e.tensor(call["update"], dtype)
    # [batch, channels, states]: the sizes without that of the sequence.
    sizes = e.op("Gather", e.op("Shape", update), e.ints(0, 1, 3))
    zeros = e.cast(e.op("ConstantOfShape", sizes), torch.float32, dtype)
    attributes: dict[str, Any] = {
        "body": _step(e, update.type),
        "num_scan_inputs": 2,
        "scan_input_axes": [2, 2],
        "scan_output_axes": [2],
    }
    operands = [zeros, e.tensor(call["decay"], dtype), update]
    return e.add("Scan", operands, attributes, outputs=2)[1]


def _step(e: Emission, kind: ir.TypeProtocol | None) -> ir.Graph:
    """``state = decay state + update``, for one step."""
    names = ("state", "decay", "update")
    inputs = [ir.Value(name=e.unique(f"{e.scope}/{name}")) for name in names]
    state, decay, update = inputs
    inner = e.inside()
    after = inner.op("Add", inner.op("Mul", decay, state), update)
    kept = inner.op("Identity", after)
    for value in (*inputs, after, kept):
        value.type = kind
    return ir.Graph(inputs, [after, kept], nodes=inner.nodes, name=e.unique(f"{e.scope}/step"))


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.scatter_add.default: scatter_add,
        aten.threshold_backward.default: threshold_backward,
        aten.max_pool2d_with_indices.default: max_pool2d_with_indices,
        lam.linear_scan.default: linear_scan,
        lam.dequantize_nbits.default: dequantized.weight,
    }
)
"""Operator -> emitter."""
