"""Tensors made from nothing, and casts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.types import onnx_type

aten = torch.ops.aten


def arange(e: Emission, call: Call) -> ir.Value:
    """Numbers from start to end."""
    dtype = call.out.dtype
    names = ("start", "end", "step")
    if all(isinstance(call[name], int | float) for name in names):
        start, end, step = (call[name] for name in names)
        return e.const(torch.arange(start, end, step, dtype=dtype).numpy(), dtype)
    # Range has no kernel for small integers; sizes are integers in any case.
    wide = dtype if dtype.is_floating_point or dtype == torch.int32 else torch.int64
    return e.cast(e.op("Range", *(e.tensor(call[name], wide) for name in names)), wide, dtype)


def full(e: Emission, call: Call) -> ir.Value:
    """One number everywhere."""
    dtype, value = call.out.dtype, call["fill_value"]
    if call.out.ndim == 0:
        return e.tensor(value, dtype)
    shape = e.dims(call["size"])
    if not isinstance(value, int | float | bool):
        return e.op("Expand", e.tensor(value, dtype), shape)
    kind = onnx_type(dtype)
    filled = ir.Tensor(np.full((1,), value, kind.numpy()), dtype=kind)
    return e.op("ConstantOfShape", shape, value=filled)


def scalar_tensor(e: Emission, call: Call) -> ir.Value:
    """A number as a tensor without axes."""
    return e.tensor(call["s"], call.out.dtype)


def cast(e: Emission, call: Call) -> ir.Value:
    """Another dtype."""
    return e.tensor(call["self"], call.out.dtype)


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.arange.start_step: arange,
        aten.full.default: full,
        aten.scalar_tensor.default: scalar_tensor,
        aten.to.dtype: cast,
    }
)
"""Operator -> emitter."""
