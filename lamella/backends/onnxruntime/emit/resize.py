"""Images of another size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter

aten = torch.ops.aten


def _resize(mode: str) -> Emitter:
    """Coordinates as in PyTorch: of pixel centers, of corners, or (nearest) of pixel edges."""

    def emit(e: Emission, call: Call) -> ir.Value:
        attributes: dict[str, Any] = {"mode": mode}
        if mode == "nearest":
            attributes |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        elif call["align_corners"]:
            attributes["coordinate_transformation_mode"] = "align_corners"
        else:
            attributes["coordinate_transformation_mode"] = "half_pixel"
        if mode == "cubic":
            attributes["cubic_coeff_a"] = -0.75
        x, factors = e.tensor(call["input"]), call["scale_factors"]
        if factors is not None and all(isinstance(factor, int | float) for factor in factors):
            scales = e.const(np.array([1.0, 1.0, *factors], np.float32))
            return e.op("Resize", x, None, scales, **attributes)
        kept = e.op("Shape", x, start=0, end=2)
        sizes = e.op("Concat", kept, e.dims(call["output_size"]), axis=0)
        return e.op("Resize", x, None, None, sizes, **attributes)

    return emit


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.upsample_nearest2d.vec: _resize("nearest"),
        aten.upsample_bilinear2d.vec: _resize("linear"),
        aten.upsample_bicubic2d.vec: _resize("cubic"),
    }
)
"""Operator -> emitter."""
