"""Padding in its modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.errors import BackendError

aten = torch.ops.aten

_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def pad(e: Emission, call: Call) -> ir.Value:
    """PyTorch counts pairs from the last axis, ONNX all beginnings and then all ends."""
    mode = call.arguments.get("mode", "constant")
    if mode not in _MODES:
        raise BackendError(f"there is no padding mode {mode!r}")
    amounts, rank = list(call["pad"]), call.out.ndim
    if all(amount == 0 for amount in amounts if isinstance(amount, int)) and all(
        isinstance(amount, int) for amount in amounts
    ):
        return e.tensor(call["self"])
    count = len(amounts) // 2
    begins, ends = amounts[0::2][::-1], amounts[1::2][::-1]
    value = None
    if mode == "constant":
        value = e.const(call["value"] or 0, call.out.dtype)
    axes = e.ints(*range(rank - count, rank))
    return e.op(
        "Pad", e.tensor(call["self"]), e.dims([*begins, *ends]), value, axes, mode=_MODES[mode]
    )


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {aten.pad.default: pad, aten.constant_pad_nd.default: pad}
)
"""Operator -> emitter."""
