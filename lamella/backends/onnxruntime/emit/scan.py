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
    dtype = call.out.dtype
    sizes = e.op("Shape", e.tensor(call["input"]), start=0, end=2)
    states = e.op("Shape", e.tensor(call["a"]), start=1, end=2)
    zeros = e.op("ConstantOfShape", e.op("Concat", sizes, states, axis=0))
    return scan_from(e, call, e.cast(zeros, torch.float32, dtype), dtype)[1]


def scan_from(e: Emission, call: Call, state: ir.Value, dtype: torch.dtype) -> tuple[ir.Value, ...]:
    """The state after all tokens, and the results."""
    sequences = [e.tensor(call[name], dtype) for name in ("input", "delta", "b", "c")]
    attributes: dict[str, Any] = {
        "body": _step(e, e.tensor(call["a"], dtype)),
        "num_scan_inputs": len(sequences),
        "scan_input_axes": [2] * len(sequences),
        "scan_output_axes": [2],
    }
    return e.add("Scan", [state, *sequences], attributes, outputs=2)


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
