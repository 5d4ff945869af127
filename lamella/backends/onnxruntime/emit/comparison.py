"""Comparisons and logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.emit.arithmetic import wide

aten = torch.ops.aten

_COMPARISONS = {
    "eq": "Equal",
    "ne": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}


def _comparison(name: str) -> Emitter:
    def emit(e: Emission, call: Call) -> ir.Value:
        dtype = wide(call["self"], call["other"])
        if dtype == torch.bool and name not in ("eq", "ne"):
            dtype = torch.int32
        left, right = e.tensor(call["self"], dtype), e.tensor(call["other"], dtype)
        result = e.op(_COMPARISONS[name], left, right)
        return e.op("Not", result) if name == "ne" else result

    return emit


def _logical(op_type: str) -> Emitter:
    """Logic on what is not zero."""

    def emit(e: Emission, call: Call) -> ir.Value:
        names = ("self", "other") if "other" in call.arguments else ("self",)
        return e.op(op_type, *(e.tensor(call[name], torch.bool) for name in names))

    return emit


def _bitwise(op_type: str) -> Emitter:
    """Logic on booleans, or on the bits of integers."""

    def emit(e: Emission, call: Call) -> ir.Value:
        names = ("self", "other") if "other" in call.arguments else ("self",)
        values = [e.tensor(call[name], call.out.dtype) for name in names]
        return e.op(op_type if call.out.dtype == torch.bool else f"Bitwise{op_type}", *values)

    return emit


def isnan(e: Emission, call: Call) -> ir.Value:
    """Whether an entry is not a number; integers never are."""
    dtype = call.fake("self").dtype
    wanted = dtype if dtype.is_floating_point else torch.float32
    return e.op("IsNaN", e.tensor(call["self"], wanted))


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.eq.Tensor: _comparison("eq"),
        aten.eq.Scalar: _comparison("eq"),
        aten.ne.Tensor: _comparison("ne"),
        aten.ne.Scalar: _comparison("ne"),
        aten.lt.Tensor: _comparison("lt"),
        aten.lt.Scalar: _comparison("lt"),
        aten.le.Tensor: _comparison("le"),
        aten.le.Scalar: _comparison("le"),
        aten.gt.Tensor: _comparison("gt"),
        aten.gt.Scalar: _comparison("gt"),
        aten.ge.Tensor: _comparison("ge"),
        aten.ge.Scalar: _comparison("ge"),
        aten.logical_and.default: _logical("And"),
        aten.logical_or.default: _logical("Or"),
        aten.logical_not.default: _logical("Not"),
        aten.bitwise_and.Tensor: _bitwise("And"),
        aten.bitwise_or.Tensor: _bitwise("Or"),
        aten.bitwise_not.default: _bitwise("Not"),
        aten.isnan.default: isnan,
    }
)
"""Operator -> emitter."""
