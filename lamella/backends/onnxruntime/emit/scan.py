"""Recurrences over the sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter

lam = torch.ops.lamella


def selective_scan(e: Emission, call: Call) -> ir.Value:
    """A `Scan` over the sequence whose state is ``[batch, channels, states]``."""
    names = ("input", "delta", "b", "c")
    sequences = [e.tensor(call[name], call.out.dtype) for name in names]
    a = e.tensor(call["a"], call.out.dtype)
    batch = e.op("Shape", sequences[0], start=0, end=2)
    states = e.op("Shape", a, start=1, end=2)
    zeros = e.op("ConstantOfShape", e.op("Concat", batch, states, axis=0))
    start = e.cast(zeros, torch.float32, call.out.dtype)
    attributes: dict[str, Any] = {
        "body": _step(e, a),
        "num_scan_inputs": len(sequences),
        "scan_input_axes": [2] * len(sequences),
        "scan_output_axes": [2],
    }
    return e.add("Scan", [start, *sequences], attributes, outputs=2)[1]


def _step(e: Emission, a: ir.Value) -> ir.Graph:
    """``state = exp(delta a) state + delta b x`` and ``y = <c, state>``, for one token."""
    names = ("state", "x", "delta", "b", "c")
    inputs = [ir.Value(name=e.unique(f"{e.scope}/{name}")) for name in names]
    state, x, delta, b, c = inputs
    inner = e.inside()
    last, middle = e.ints(-1), e.ints(1)
    decay = inner.op("Exp", inner.op("Mul", inner.op("Unsqueeze", delta, last), a))
    step = inner.op("Unsqueeze", inner.op("Mul", delta, x), last)
    update = inner.op("Mul", step, inner.op("Unsqueeze", b, middle))
    after = inner.op("Add", inner.op("Mul", decay, state), update)
    read = inner.op("MatMul", after, inner.op("Unsqueeze", c, last))
    y = inner.op("Squeeze", read, last)
    for value in (*inputs, after, y):
        value.type = a.type
    return ir.Graph(inputs, [after, y], nodes=inner.nodes, name=e.unique(f"{e.scope}/step"))


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {lam.selective_scan.default: selective_scan}
)
"""Operator -> emitter."""
