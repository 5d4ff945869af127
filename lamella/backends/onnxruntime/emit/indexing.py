"""Reading and writing by index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.extents import same_size

aten = torch.ops.aten


def embedding(e: Emission, call: Call) -> ir.Value:
    """Rows of a table."""
    return e.op("Gather", e.tensor(call["weight"]), e.tensor(call["indices"]), axis=0)


def gather(e: Emission, call: Call) -> ir.Value:
    """One entry along an axis for each place of the index."""
    index = e.tensor(call["index"])
    return e.op("GatherElements", e.tensor(call["self"]), index, axis=call.axis())


def index_select(e: Emission, call: Call) -> ir.Value:
    """Entries of an axis by a vector of places."""
    return e.op("Gather", e.tensor(call["self"]), e.tensor(call["index"]), axis=call.axis())


def index(e: Emission, call: Call) -> ir.Value:
    """Advanced indexing: index tensors for some axes, None for those that stay.

    The axes of the broadcast index stand where the indexed axes were if these are neighbors,
    else in front, as in PyTorch and NumPy.
    """
    given = _without_masks(e, call["indices"])
    axes = [axis for axis, (value, _) in enumerate(given) if value is not None]
    rank = call.fake("self").ndim
    x = e.tensor(call["self"])
    if len(axes) == 1:
        value = given[axes[0]][0]
        return e.op("Gather", x, value, axis=axes[0])
    rest = [axis for axis in range(rank) if axis not in axes]
    if axes != list(range(len(axes))):
        x = e.op("Transpose", x, perm=axes + rest)
    places, count = _stacked(e, [given[axis] for axis in axes])
    found = e.op("GatherND", x, places)
    neighbors = axes == list(range(axes[0], axes[0] + len(axes)))
    if not neighbors or axes[0] == 0:
        return found
    total, front = count + len(rest), axes[0]
    order = [*range(count, count + front), *range(count), *range(count + front, total)]
    return e.op("Transpose", found, perm=order)


Index = tuple[ir.Value | None, Sequence[Any]]


def _without_masks(e: Emission, indices: Sequence[Any]) -> list[Index]:
    """Each index with its shape; a boolean mask becomes the places where it is true."""
    given: list[Index] = []
    for node in indices:
        if not isinstance(node, Node):
            given.append((None, ()))
            continue
        held = node.meta["val"]
        if held.dtype not in (torch.bool, torch.uint8):
            given.append((e.tensor(node, torch.int64), held.shape))
            continue
        places = e.op("NonZero", e.tensor(node, torch.bool))
        rows = e.add("Split", (places,), {"axis": 0, "num_outputs": held.ndim}, outputs=held.ndim)
        # All of them have the same length, whatever it is.
        given += [(e.op("Squeeze", row, e.ints(0)), (f"true of {node}",)) for row in rows]
    return given


def _stacked(e: Emission, given: Sequence[Index]) -> tuple[ir.Value, int]:
    """Broadcast index tensors stacked along a new last axis, and how many axes they have."""
    count = max(len(shape) for _, shape in given)
    values = [value for value, _ in given if value is not None]
    first = given[0][1]
    alike = all(
        len(shape) == len(first) and all(map(same_size, shape, first)) for _, shape in given
    )
    if not alike:
        total = values[0]
        for value in values[1:]:
            total = e.op("Add", total, value)
        shape = e.op("Shape", total)
        values = [e.op("Expand", value, shape) for value in values]
    parts = [e.op("Unsqueeze", value, e.ints(-1)) for value in values]
    return e.op("Concat", *parts, axis=-1), count


def index_put(e: Emission, call: Call) -> ir.Value:
    """The tensor with some entries replaced, or added to."""
    given = _without_masks(e, call["indices"])
    axes = [axis for axis, (value, _) in enumerate(given) if value is not None]
    rank = call.out.ndim
    rest = [axis for axis in range(rank) if axis not in axes]
    x, order = e.tensor(call["self"]), axes + rest
    places, count = _stacked(e, [given[axis] for axis in axes])
    # The values have the axes of the index where the indexed axes were if these are neighbors.
    front = axes[0] if axes == list(range(axes[0], axes[0] + len(axes))) else 0
    sizes = [
        e.op("Gather", e.op("Shape", x), e.ints(*part)) for part in (rest[:front], rest[front:])
    ]
    shape = e.op("Concat", sizes[0], e.op("Shape", places, end=-1), sizes[1], axis=0)
    updates = e.op("Expand", e.tensor(call["values"], call.out.dtype), shape)
    if front:
        behind = range(front + count, count + len(rest))
        perm = [*range(front, front + count), *range(front), *behind]
        updates = e.op("Transpose", updates, perm=perm)
    moved = order != list(range(rank))
    target = e.op("Transpose", x, perm=order) if moved else x
    reduction = "add" if call["accumulate"] else "none"
    result = e.op("ScatterND", target, places, updates, reduction=reduction)
    if not moved:
        return result
    return e.op("Transpose", result, perm=[order.index(axis) for axis in range(rank)])


def scatter(e: Emission, call: Call) -> ir.Value:
    """The tensor with one entry along an axis replaced for each place of the index."""
    index_ = e.tensor(call["index"])
    if "src" in call.arguments:
        updates = e.tensor(call["src"], call.out.dtype)
        if not all(map(same_size, call.fake("src").shape, call.fake("index").shape)):
            rank = call.out.ndim
            starts, axes = e.ints(*[0] * rank), e.ints(*range(rank))
            updates = e.op("Slice", updates, starts, e.op("Shape", index_), axes)
    else:
        updates = e.op("Expand", e.tensor(call["value"], call.out.dtype), e.op("Shape", index_))
    return e.op("ScatterElements", e.tensor(call["self"]), index_, updates, axis=call.axis())


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.embedding.default: embedding,
        aten.gather.default: gather,
        aten.index_select.default: index_select,
        aten.index.Tensor: index,
        aten.index_put.default: index_put,
        aten.scatter.src: scatter,
        aten.scatter.value: scatter,
    }
)
"""Operator -> emitter."""
