"""Convolutions and pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.extents import is_fixed
from lamella.errors import BackendError

aten = torch.ops.aten


def _per_axis(given: Sequence[int] | int, count: int) -> list[int]:
    """One number per axis; a single one stands for all."""
    listed = list(given) if isinstance(given, list | tuple) else [int(given)]  # pyright: ignore[reportArgumentType]
    return [int(number) for number in (listed * count if len(listed) == 1 else listed)]


def _conv(axes: int) -> Emitter:
    def emit(e: Emission, call: Call) -> ir.Value:
        padding = _per_axis(call["padding"], axes)
        return e.op(
            "Conv",
            e.tensor(call["input"]),
            e.tensor(call["weight"]),
            e.optional(call["bias"]),
            strides=_per_axis(call["stride"], axes),
            pads=padding * 2,
            dilations=_per_axis(call["dilation"], axes),
            group=int(call["groups"]),
        )

    return emit


def conv_transpose(e: Emission, call: Call) -> ir.Value:
    """The transposed convolution."""
    return e.op(
        "ConvTranspose",
        e.tensor(call["input"]),
        e.tensor(call["weight"]),
        e.optional(call["bias"]),
        strides=_per_axis(call["stride"], 2),
        pads=_per_axis(call["padding"], 2) * 2,
        output_padding=_per_axis(call["output_padding"], 2),
        dilations=_per_axis(call["dilation"], 2),
        group=int(call["groups"]),
    )


def _pool(op_type: str, axes: int) -> Emitter:
    def emit(e: Emission, call: Call) -> ir.Value:
        size = _per_axis(call["kernel_size"], axes)
        stride = _per_axis(call["stride"], axes) if call["stride"] else size
        more: dict[str, Any] = {"ceil_mode": int(call["ceil_mode"])}
        if op_type == "MaxPool":
            more["dilations"] = _per_axis(call["dilation"], axes)
        elif call.arguments.get("divisor_override"):
            raise BackendError("average pooling with a divisor of its own has no ONNX operator")
        else:
            more["count_include_pad"] = int(call["count_include_pad"])
        pads = _per_axis(call["padding"], axes) * 2
        # PyTorch pools without a batch as well; ONNX wants one.
        x, lone = e.tensor(call["self"]), call.out.ndim == axes + 1
        x = e.op("Unsqueeze", x, e.ints(0)) if lone else x
        pooled = e.op(op_type, x, kernel_shape=size, strides=stride, pads=pads, **more)
        return e.op("Squeeze", pooled, e.ints(0)) if lone else pooled

    return emit


def _adaptive_average(axes: int) -> Emitter:
    """Equal windows, or windows that overlap as matrix products with constants."""

    def emit(e: Emission, call: Call) -> ir.Value:
        x, wanted = e.tensor(call["self"]), _per_axis(call["output_size"], axes)
        rank = call.out.ndim
        if all(size == 1 for size in wanted):
            return e.op("ReduceMean", x, e.ints(*range(rank - axes, rank)), keepdims=1)
        sizes = call.fake("self").shape[-axes:]
        if not all(map(is_fixed, sizes)):
            raise BackendError(
                "adaptive pooling to more than one entry needs inputs of a fixed size; capture "
                "with dynamic=False"
            )
        for place, (size, count) in enumerate(zip(map(int, sizes), wanted, strict=True)):
            if size != count:
                x = _averaged(e, x, (rank, rank - axes + place), (size, count))
        return x

    return emit


def _averaged(
    e: Emission, x: ir.Value, axis_of: tuple[int, int], sizes: tuple[int, int]
) -> ir.Value:
    """Means over windows of one axis, ``[floor(i n / m), ceil((i + 1) n / m))``."""
    (rank, axis), (size, count) = axis_of, sizes
    windows = torch.zeros(size, count)
    for place in range(count):
        start, stop = place * size // count, -(-(place + 1) * size // count)
        windows[start:stop, place] = 1 / (stop - start)
    order = [other for other in range(rank) if other != axis] + [axis]
    moved = e.op("Transpose", x, perm=order)
    product = e.op("MatMul", moved, e.const(windows.numpy()))
    back = [order.index(other) for other in range(rank)]
    return e.op("Transpose", product, perm=back)


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.conv1d.default: _conv(1),
        aten.conv2d.default: _conv(2),
        aten.conv_transpose2d.input: conv_transpose,
        aten.max_pool2d.default: _pool("MaxPool", 2),
        aten.avg_pool2d.default: _pool("AveragePool", 2),
        aten.avg_pool1d.default: _pool("AveragePool", 1),
        aten.adaptive_avg_pool2d.default: _adaptive_average(2),
        aten.adaptive_avg_pool1d.default: _adaptive_average(1),
    }
)
"""Operator -> emitter."""
