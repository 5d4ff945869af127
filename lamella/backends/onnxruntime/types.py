"""The dtypes of PyTorch in ONNX, and the promotion that PyTorch does silently."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from lamella.errors import BackendError

_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


def onnx_type(dtype: torch.dtype) -> ir.DataType:
    """The ONNX type of a PyTorch dtype.

    Raises:
        BackendError: ONNX has no such type.
    """
    found = _TYPES.get(dtype)
    if found is None:
        raise BackendError(f"{dtype} has no type in ONNX; convert the model, e.g. with .float()")
    return found


def promoted(left: Any, right: Any) -> torch.dtype:
    """The dtype in which PyTorch combines two operands: fake tensors or Python numbers."""
    return torch.result_type(_stand_in(left), _stand_in(right))


def _stand_in(operand: Any) -> Any:
    """Something without data that promotes as `operand` does."""
    if isinstance(operand, Tensor):
        return torch.empty((1,) * min(operand.ndim, 1), dtype=operand.dtype, device="meta")
    if isinstance(operand, torch.SymInt):
        return 1
    return operand
