"""What weights take in files, exactly, before anything is rounded.

The bytes are those of the tensors; headers, names and tokenizers come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from lamella.checkpoints.gguf_blocks import GROUP
from lamella.checkpoints.gguf_types import kind_of, row_bytes
from lamella.ir.quantize import Format, dense_bytes, weight_bytes

Shape = tuple[int, int]
ByteFormula = Callable[[Shape, Format, torch.dtype, bool], int]
"""From the shape of a matrix, its format, its type as it is, and whether it is a table of
embeddings (or tied to one) to bytes."""

_WORD = 4
_SHAPE = 16
"""Two integers of 8 bytes: the shape of a weight."""


def onnx_bytes(shape: Shape, format: Format, dtype: torch.dtype, is_table: bool) -> int:
    """In an ONNX file, where codes are as kernels read them."""
    return weight_bytes(shape, format, dtype)


def package_bytes(shape: Shape, format: Format, dtype: torch.dtype, is_table: bool) -> int:
    """In a saved torch executable, where codes have their own width."""
    return dense_bytes(shape, format, dtype)


def compressed_tensors_bytes(
    shape: Shape, format: Format, dtype: torch.dtype, is_table: bool
) -> int:
    """In the format ``pack-quantized``: 32-bit words, scales, zero points, and the shape.

    Tables, and rows that are no whole blocks, stay floating point.
    """
    rows, columns = shape
    if format.bits == 32 or is_table or columns % format.block:
        return rows * columns * dtype.itemsize
    blocks = columns // format.block
    codes = rows * (columns * format.bits // 32) * _WORD
    # Readers multiply in the type of the scales.
    scale = dtype.itemsize if dtype.itemsize >= 4 else format.scale_dtype.itemsize
    zeros = 0 if format.symmetric else math.ceil(rows * format.bits / 32) * _WORD * blocks
    return codes + rows * blocks * scale + zeros + _SHAPE


def gguf_bytes(shape: Shape, format: Format, dtype: torch.dtype, is_table: bool) -> int:
    """In a GGUF file; rows that are no whole groups of 32 stay floating point."""
    rows, columns = shape
    if format.bits == 32 or columns % GROUP:
        return rows * columns * dtype.itemsize
    return rows * row_bytes(kind_of(format.bits, format.symmetric, columns), columns)


FORMULAS: Mapping[str, ByteFormula] = MappingProxyType(
    {
        "onnxruntime": onnx_bytes,
        "eager": package_bytes,
        "compressed-tensors": compressed_tensors_bytes,
        "gguf": gguf_bytes,
    }
)
"""Where weights go -> what they take there."""
