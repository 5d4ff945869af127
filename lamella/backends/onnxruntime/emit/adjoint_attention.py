"""The adjoints of attention, written out: there is no operator for them in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter

lam = torch.ops.lamella


def attention_adjoint(e: Emission, call: Call) -> tuple[ir.Value, ...]:
    """The coefficients of queries, keys and values."""
    dtype = call.out_of(0).dtype
    given = (e.tensor(call[name], dtype) for name in ("coefficient", "output", "query", "key"))
    coefficient, output, query, key = given
    weights = _probabilities(e, call, dtype)
    of_weights = e.op("MatMul", coefficient, _turned(e, e.tensor(call["value"], dtype), call))
    total = e.op("ReduceSum", e.op("Mul", coefficient, output), e.ints(-1), keepdims=1)
    scores = e.op("Mul", weights, e.op("Sub", of_weights, total))
    scores = e.op("Mul", scores, e.const(float(call["scale"]), dtype))
    return (
        e.op("MatMul", scores, key),
        e.op("MatMul", _turned(e, scores, call), query),
        e.op("MatMul", _turned(e, weights, call), coefficient),
    )


def attention_value_adjoint(e: Emission, call: Call) -> ir.Value:
    """The coefficient of the values."""
    dtype = call.out.dtype
    weights = _turned(e, _probabilities(e, call, dtype), call)
    return e.op("MatMul", weights, e.tensor(call["coefficient"], dtype))


def _probabilities(e: Emission, call: Call, dtype: torch.dtype) -> ir.Value:
    """The softmax of the masked scores; zero where everything is masked."""
    query = e.op("Mul", e.tensor(call["query"], dtype), e.const(float(call["scale"]), dtype))
    scores = e.op("MatMul", query, _turned(e, e.tensor(call["key"], dtype), call))
    allowed, bias = _mask(e, call, dtype)
    if allowed is None:
        return e.op("Softmax", scores, axis=-1)
    least = e.const(torch.finfo(dtype).min, dtype)
    if bias is None:
        scores = e.op("Where", allowed, scores, least)
    else:
        scores = e.op("Max", e.op("Add", scores, bias), least)
    return e.op("Where", allowed, e.op("Softmax", scores, axis=-1), e.const(0.0, dtype))


def _mask(e: Emission, call: Call, dtype: torch.dtype) -> tuple[ir.Value | None, ir.Value | None]:
    """What is seen, and what is added to the scores."""
    if call["is_causal"]:
        sizes = [e.size(call[name], -2) for name in ("query", "key")]
        ones = e.op("ConstantOfShape", e.op("Concat", *sizes, axis=0))
        triangle = e.op("Trilu", e.op("Add", ones, e.const(1.0)), upper=0)
        return e.cast(triangle, torch.float32, torch.bool), None
    mask = call["attn_mask"]
    if mask is None:
        return None, None
    if mask.meta["val"].dtype == torch.bool:
        return e.tensor(mask), None
    bias = e.tensor(mask, dtype)
    return e.op("Greater", bias, e.const(float("-inf"), dtype)), bias


def _turned(e: Emission, value: ir.Value, call: Call) -> ir.Value:
    """The last two axes exchanged."""
    rank = call.fake("query").ndim
    return e.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        lam.attention_adjoint.default: attention_adjoint,
        lam.attention_value_adjoint.default: attention_value_adjoint,
    }
)
"""Operator -> emitter."""
