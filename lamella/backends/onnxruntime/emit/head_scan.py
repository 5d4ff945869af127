"""Recurrences with heads over the sequence, from zeros or from a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter

lam = torch.ops.lamella


def head_scan(e: Emission, call: Call) -> ir.Value:
    """A `Scan` over the sequence whose state is ``[batch, heads, width, states]``."""
    dtype = call.out.dtype
    batch = e.op("Shape", e.tensor(call["input"]), start=0, end=1)
    inner = e.op("Shape", e.tensor(call["input"]), start=2, end=4)
    states = e.op("Shape", e.tensor(call["b"]), start=3, end=4)
    zeros = e.op("ConstantOfShape", e.op("Concat", batch, inner, states, axis=0))
    return _scan_from(e, call, e.cast(zeros, torch.float32, dtype), dtype)[1]


def cached_head_scan(e: Emission, call: Call) -> tuple[ir.Value, ...]:
    """A `Scan` from the state of the past; the results, and the state after them."""
    dtype = call.out_of(0).dtype
    after, results = _scan_from(e, call, e.tensor(call["state"], dtype), dtype)
    return results, after


def _scan_from(
    e: Emission, call: Call, state: ir.Value, dtype: torch.dtype
) -> tuple[ir.Value, ...]:
    """The state after all tokens, and the results."""
    sequences = [e.tensor(call[name], dtype) for name in ("input", "delta")]
    sequences += [_per_head(e, call, name, dtype) for name in ("b", "c")]
    attributes: dict[str, Any] = {
        "body": _step(e, e.tensor(call["a"], dtype)),
        "num_scan_inputs": len(sequences),
        "scan_input_axes": [1] * len(sequences),
        "scan_output_axes": [1],
    }
    return e.add("Scan", [state, *sequences], attributes, outputs=2)


def _per_head(e: Emission, call: Call, name: str, dtype: torch.dtype) -> ir.Value:
    """`b` or `c` of each head; what a single group has broadcasts."""
    value = e.tensor(call[name], dtype)
    heads, groups = int(call.fake("input").shape[2]), int(call.fake(name).shape[2])
    if groups in (1, heads):
        return value
    group = [head * groups // heads for head in range(heads)]
    return e.op("Gather", value, e.ints(*group), axis=2)


def _step(e: Emission, a: ir.Value) -> ir.Graph:
    """``state = exp(delta a) state + (delta x) b`` and ``y = <c, state>``, for one token."""
    names = ("state", "x", "delta", "b", "c")
    inputs = [ir.Value(name=e.unique(f"{e.scope}/{name}")) for name in names]
    state, x, delta, b, c = inputs
    inner = e.inside()
    last, row, square = e.ints(-1), e.ints(2), e.ints(2, 3)
    decay = inner.op("Unsqueeze", inner.op("Exp", inner.op("Mul", delta, a)), square)
    step = inner.op("Unsqueeze", inner.op("Mul", inner.op("Unsqueeze", delta, last), x), last)
    update = inner.op("Mul", step, inner.op("Unsqueeze", b, row))
    after = inner.op("Add", inner.op("Mul", decay, state), update)
    read = inner.op("MatMul", after, inner.op("Unsqueeze", c, last))
    y = inner.op("Squeeze", read, last)
    for value in (*inputs, after, y):
        value.type = a.type
    return ir.Graph(inputs, [after, y], nodes=inner.nodes, name=e.unique(f"{e.scope}/step"))


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        lam.head_scan.default: head_scan,
        lam.cached_head_scan.default: cached_head_scan,
    }
)
"""Operator -> emitter."""
