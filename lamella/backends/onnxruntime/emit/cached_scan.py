"""Recurrences that go on from a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.emit.scan import scan_from

lam = torch.ops.lamella


def cached_selective_scan(e: Emission, call: Call) -> tuple[ir.Value, ...]:
    """A `Scan` from the state of the past; the results, and the state after them."""
    state = e.tensor(call["state"], call.out_of(0).dtype)
    after, results = scan_from(e, call, state, call.out_of(0).dtype)
    return results, after


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {lam.cached_selective_scan.default: cached_selective_scan}
)
"""Operator -> emitter."""
