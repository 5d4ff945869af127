"""The names of PyTorch that have no public home, in one place.

A new release of PyTorch that moves one of them breaks this module and no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import Source, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, statically_known_true
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "StorageWeakRef",
    "TreeSpec",
    "detect_fake_mode",
    "enable_python_dispatcher",
    "int4_linear",
    "int4_packed",
    "int8_linear",
    "int8_product",
    "settled",
    "statically_known_true",
    "symbolic_mode",
    "symbolic_size",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "treespec_dumps",
    "treespec_loads",
]


@dataclass(frozen=True)
class _Named(Source):
    """Where a symbolic size comes from: only a name (dynamo's own sources load all of dynamo)."""

    label: str

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  (cached there)
        return self.label

    @property
    def _name_template(self) -> str:
        return self.label


def symbolic_mode() -> FakeTensorMode:
    """A mode whose fake tensors may have symbolic sizes."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def symbolic_size(mode: FakeTensorMode, name: str, example: int) -> int | SymInt:
    """A new symbolic size of `mode`; `example` answers the comparisons that shape rules make."""
    env: Any = mode.shape_env
    source = _Named(name)
    symbol = env.create_symbol(example, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return env.create_symintnode(symbol, hint=example, source=source)


def settled(value: object) -> object:
    """`value` with the sizes that its trace fixed as integers; a `SymInt` may hold just 8."""
    if isinstance(value, SymInt):
        return _settled_size(value)
    if not isinstance(value, FakeTensor):
        return value
    sizes = [_settled_size(size) for size in value.shape]
    if all(one is two for one, two in zip(sizes, value.shape, strict=True)):
        return value
    strides = [_settled_size(stride) for stride in value.stride()]
    with value.fake_mode:
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def _settled_size(size: int | SymInt) -> int | SymInt:
    known = size.node.maybe_as_int() if isinstance(size, SymInt) else None
    return size if known is None else known


def int4_packed(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits, int32 ``[out, in]``, in the layout of `int4_linear`."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu.default(codes, 1)


def int4_linear(
    input: torch.Tensor, packed: torch.Tensor, block: int, slopes: torch.Tensor
) -> torch.Tensor:
    """bfloat16 ``[rows, in]`` by weights of 4 bits, with scales and offsets of blocks."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu.default(input, packed, block, slopes)


def int8_linear(input: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 ``[rows, in]`` by weights of 8 bits with a scale for each output."""
    return torch.ops.aten._weight_int8pack_mm.default(input, codes, scales)


def int8_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """int8 ``[rows, in]`` by int8 ``[in, out]``, as int32."""
    return torch.ops.aten._int_mm.default(left, right)
