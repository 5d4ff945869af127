"""Weights as initializers that are read when the file is written, one at a time."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.tensor_adapters
import torch
from torch import Tensor
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Emission
from lamella.backends.onnxruntime.types import onnx_type
from lamella.ir import ops

aten = torch.ops.aten
lam = torch.ops.lamella

_LINEAR = (aten.linear.default, lam.linear_int8.default, lam.linear_int8_static.default)


def place_weight(e: Emission, node: Node) -> None:
    """Make the initializer of a weight.

    A matrix that only linear layers read is stored transposed, ``[in, out]``, as `MatMul`
    takes it; everything else as it is in the graph.
    """
    name, held = str(node.target), node.meta["val"]
    if is_matrix_of_linears(node):
        shape = (held.shape[1], held.shape[0])
        value = stored(e, name, lambda: e.graph.weight(node).t(), shape, held.dtype)
        e.views[node, "transposed"] = value
    else:
        shape = tuple(held.shape)
        e.values[node] = stored(e, name, lambda: e.graph.weight(node), shape, held.dtype)


def is_matrix_of_linears(node: Node) -> bool:
    """Whether only linear layers read a weight, as their matrix."""
    return node.meta["val"].ndim == 2 and all(
        user.target in _LINEAR
        and [name for name, value in ops.bind(user).items() if value is node] == ["weight"]
        for user in node.users
    )


def stored(
    e: Emission,
    name: str,
    read: Callable[[], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> ir.Value:
    """An initializer whose data is read by `read` whenever it is written, and not kept."""
    name = e.unique(name)

    def tensor() -> ir.TensorProtocol:
        return onnx_ir.tensor_adapters.TorchTensor(read().contiguous(), name=name)

    lazy = ir.LazyTensor(tensor, onnx_type(dtype), ir.Shape(list(map(int, shape))), name=name)
    return e.initializer(lazy)
