"""Tensors of ONNX as tensors of PyTorch that share the memory of the file.

Nothing that a file says about a tensor is believed: rank, sizes and the number of bytes are
checked before memory is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lamella.errors import CaptureError, ModelFileError
from lamella.ir.onnx.external import ExternalFiles
from lamella.ir.packing import unpack

DTYPES: Mapping[ir.DataType, torch.dtype] = MappingProxyType(
    {
        ir.DataType.FLOAT: torch.float32,
        ir.DataType.DOUBLE: torch.float64,
        ir.DataType.FLOAT16: torch.float16,
        ir.DataType.BFLOAT16: torch.bfloat16,
        ir.DataType.INT8: torch.int8,
        ir.DataType.INT16: torch.int16,
        ir.DataType.INT32: torch.int32,
        ir.DataType.INT64: torch.int64,
        ir.DataType.UINT8: torch.uint8,
        ir.DataType.UINT16: torch.uint16,
        ir.DataType.UINT32: torch.uint32,
        ir.DataType.UINT64: torch.uint64,
        ir.DataType.BOOL: torch.bool,
        ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
        ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    }
)
"""The types of ONNX that PyTorch has too."""

PACKED: Mapping[ir.DataType, tuple[int, bool]] = MappingProxyType(
    {
        ir.DataType.INT4: (4, True),
        ir.DataType.UINT4: (4, False),
        ir.DataType.INT2: (2, True),
        ir.DataType.UINT2: (2, False),
    }
)
"""Types that share bytes: bits, signed."""

_MAX_RANK = 64
_MAX_BYTES = 1 << 46


def dtype_of(number: int | ir.DataType, where: str) -> torch.dtype:
    """The PyTorch type of a type number; packed integers become int8 and uint8.

    Raises:
        CaptureError: PyTorch has no such type.
    """
    try:
        kind = ir.DataType(number)
    except ValueError as error:
        raise ModelFileError(f"{where} has the data type {number}, unknown to ONNX") from error
    if kind in PACKED:
        return torch.int8 if PACKED[kind][1] else torch.uint8
    if kind not in DTYPES:
        known = ", ".join(sorted(d.name for d in (*DTYPES, *PACKED)))
        raise CaptureError(f"{where} has the data type {kind.name}; supported are {known}")
    return DTYPES[kind]


def check(tensor: ir.TensorProtocol, files: ExternalFiles, owner: str) -> None:
    """Check what can be checked without reading the data of `tensor`.

    Raises:
        ModelFileError: The sizes are absurd, or the data lies outside of the model's folder.
    """
    sizes = _sizes(tensor, owner)
    if isinstance(tensor, ir.ExternalTensor):
        _external(tensor, sizes, files, owner)


def load(tensor: ir.TensorProtocol, files: ExternalFiles, owner: str) -> Tensor:
    """`tensor` as a PyTorch tensor; external data is mapped, not read.

    Raises:
        CaptureError: PyTorch has no such data type.
        ModelFileError: The data doesn't have the size that the shape says.
    """
    dtype = dtype_of(tensor.dtype, f"tensor {owner!r}")
    sizes = _sizes(tensor, owner)
    if isinstance(tensor, ir.ExternalTensor):
        data = _external(tensor, sizes, files, owner)
    else:
        data = _inline(tensor, sizes, owner)
    if tensor.dtype in PACKED:
        return _unpacked(torch.from_numpy(data), sizes, *PACKED[tensor.dtype])
    if data.ctypes.data % dtype.itemsize:
        data = data.copy()
    return torch.from_numpy(data).view(dtype).reshape(sizes)


def _sizes(tensor: ir.TensorProtocol, owner: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in tensor.shape.numpy())
    if len(sizes) > _MAX_RANK or any(size < 0 for size in sizes):
        raise ModelFileError(f"tensor {owner!r} has the impossible shape {_brief(sizes)}")
    if math.prod(max(size, 1) for size in sizes) * 16 > _MAX_BYTES:
        raise ModelFileError(f"tensor {owner!r} has an absurd size: shape {_brief(sizes)}")
    return sizes


def _brief(sizes: Sequence[int]) -> str:
    shown = ", ".join(map(str, sizes[:8]))
    return f"[{shown}{', …' if len(sizes) > 8 else ''}]"


def _bytes_of(dtype: ir.DataType, sizes: Sequence[int]) -> int:
    return (math.prod(sizes) * int(dtype.bitwidth) + 7) // 8


def _external(
    tensor: ir.ExternalTensor, sizes: Sequence[int], files: ExternalFiles, owner: str
) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    expected = _bytes_of(tensor.dtype, sizes)
    length = expected if tensor.length is None else tensor.length
    if length != expected:
        raise ModelFileError(
            f"tensor {owner!r} has {length} bytes in {str(tensor.location)!r}, its shape "
            f"{_brief(sizes)} needs {expected}"
        )
    return files.read(str(tensor.location), tensor.offset or 0, length, owner)


def _inline(
    tensor: ir.TensorProtocol, sizes: Sequence[int], owner: str
) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes of a tensor that lies in the model itself, writable."""
    expected = _bytes_of(tensor.dtype, sizes)
    try:
        data = np.frombuffer(bytearray(tensor.tobytes()), np.uint8)
    except (ValueError, TypeError) as error:
        raise ModelFileError(
            f"tensor {owner!r} of shape {_brief(sizes)} doesn't hold the data that its shape "
            f"needs ({error})"
        ) from error
    if len(data) != expected:
        raise ModelFileError(
            f"tensor {owner!r} has {len(data)} bytes, its shape {_brief(sizes)} needs {expected}"
        )
    return data


def _unpacked(data: Tensor, sizes: Sequence[int], bits: int, signed: bool) -> Tensor:
    codes = unpack(data, bits, math.prod(sizes))
    if signed:
        half = 1 << (bits - 1)
        codes = (codes.to(torch.int8) ^ half) - half
    return codes.reshape(tuple(sizes))
