"""Other views of the same numbers: reshapes, slices, concatenations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call, Emission, Emitter
from lamella.backends.onnxruntime.extents import is_fixed, reshape_target, same_size

aten = torch.ops.aten

_END = 2**63 - 1


def reshape(e: Emission, call: Call) -> ir.Value:
    """Reshape in terms of 0 (copy) and -1 (the rest) where they say it all."""
    source = call["self"]
    before, after = list(call.fake("self").shape), list(call.out.shape)
    same = len(before) == len(after) and all(map(same_size, before, after))
    if same:
        return e.tensor(source)
    heads = e.views.get((source, "heads last"))
    joins = len(before) == 4 and len(after) == 3 and all(map(same_size, before[:2], after[:2]))
    if heads is not None and joins:
        # [batch, sequence, heads, width] joined again: attention gave it joined.
        return heads
    target, computed = reshape_target(before, after)
    if not computed:
        return e.op("Reshape", e.tensor(source), e.ints(*target))
    sizes = _target_with_nodes(target, computed, list(call["shape"]))
    return e.op("Reshape", e.tensor(source), e.dims(sizes))


def _target_with_nodes(target: list[int], computed: list[int], given: list[Any]) -> list[Any]:
    """`target` with the nodes that compute the open sizes; one of them may stay -1."""
    rest = next((place for place in computed if given[place] == -1), computed[-1])
    return [
        given[place] if place in computed and place != rest else size
        for place, size in enumerate(target)
    ]


def transpose(e: Emission, call: Call) -> ir.Value:
    """Two axes change places."""
    source, rank = call["self"], call.out.ndim
    first, second = call.axis("dim0"), call.axis("dim1")
    heads = e.views.get((source, "joined heads"))
    if heads is not None and {first, second} == {1, 2}:
        return _split_heads(e, call, heads)
    order = list(range(rank))
    order[first], order[second] = second, first
    return e.op("Transpose", e.tensor(source), perm=order)


def _split_heads(e: Emission, call: Call, heads: ir.Value) -> ir.Value:
    """The result of an attention as [batch, sequence, heads, width], without a transposition."""
    e.views[call.node, "heads last"] = heads
    count, width = (int(size) for size in call.out.shape[2:])
    return e.op("Reshape", heads, e.ints(0, 0, count, width))


def permute(e: Emission, call: Call) -> ir.Value:
    """Axes in another order."""
    rank = call.out.ndim
    return e.op("Transpose", e.tensor(call["self"]), perm=[axis % rank for axis in call["dims"]])


def unsqueeze(e: Emission, call: Call) -> ir.Value:
    """A new axis of size 1."""
    axis = int(call["dim"]) % call.out.ndim
    return e.op("Unsqueeze", e.tensor(call["self"]), e.ints(axis))


def squeeze(e: Emission, call: Call) -> ir.Value:
    """Axes of size 1 go; others stay, as in PyTorch."""
    x, given = call.fake("self"), call["dim"]
    axes = [
        axis % max(x.ndim, 1) for axis in (given if isinstance(given, list | tuple) else [given])
    ]
    ones = [axis for axis in axes if x.ndim and is_fixed(x.shape[axis]) and x.shape[axis] == 1]
    return (
        e.op("Squeeze", e.tensor(call["self"]), e.ints(*ones)) if ones else e.tensor(call["self"])
    )


def expand(e: Emission, call: Call) -> ir.Value:
    """Axes of size 1 repeated; an axis that stays is written as 1."""
    before, after = list(call.fake("self").shape), list(call.out.shape)
    padded = [1] * (len(after) - len(before)) + before
    target = [
        1 if given == -1 or same_size(was, now) else given
        for was, now, given in zip(padded, after, call["size"], strict=True)
    ]
    stays = all(not isinstance(size, Node) and size == 1 for size in target)
    if stays and len(before) == len(after):
        return e.tensor(call["self"])
    return e.op("Expand", e.tensor(call["self"]), e.dims(target))


def slice_(e: Emission, call: Call) -> ir.Value:
    """A range of one axis."""
    start = 0 if call["start"] is None else call["start"]
    end = _END if call["end"] is None else call["end"]
    if start == 0 and call["step"] == 1 and isinstance(end, int) and end == _END:
        return e.tensor(call["self"])
    bounds = (e.dims([start]), e.dims([end]), e.ints(call.axis()), e.dims([call["step"]]))
    return e.op("Slice", e.tensor(call["self"]), *bounds)


def select(e: Emission, call: Call) -> ir.Value:
    """One entry of an axis, which goes."""
    return e.op("Gather", e.tensor(call["self"]), e.scalar(call["index"]), axis=call.axis())


def cat(e: Emission, call: Call) -> ir.Value:
    """Tensors one after the other; empty ones without axes are left out, as in PyTorch."""
    dtype, rank = call.out.dtype, call.out.ndim
    parts = [part for part in call["tensors"] if part.meta["val"].ndim == rank]
    return e.op("Concat", *(e.tensor(p, dtype) for p in parts), axis=int(call["dim"]) % rank)


def stack(e: Emission, call: Call) -> ir.Value:
    """Tensors along a new axis."""
    dtype, axis = call.out.dtype, int(call["dim"]) % call.out.ndim
    parts = [e.op("Unsqueeze", e.tensor(p, dtype), e.ints(axis)) for p in call["tensors"]]
    return e.op("Concat", *parts, axis=axis)


def split_with_sizes(e: Emission, call: Call) -> tuple[ir.Value, ...]:
    """Ranges of one axis."""
    sizes = call["split_sizes"]
    inputs = (e.tensor(call["self"]), e.dims(sizes))
    return e.add("Split", inputs, {"axis": call.axis()}, outputs=len(sizes))


def repeat(e: Emission, call: Call) -> ir.Value:
    """The whole tensor several times along each axis; missing axes come first."""
    x, sizes = e.tensor(call["self"]), call["repeats"]
    missing = len(sizes) - call.fake("self").ndim
    if missing:
        x = e.op("Unsqueeze", x, e.ints(*range(missing)))
    return e.op("Tile", x, e.dims(sizes))


def repeat_interleave(e: Emission, call: Call) -> ir.Value:
    """Each entry of an axis several times in a row."""
    x, rank, count = e.tensor(call["self"]), call.fake("self").ndim, call["repeats"]
    if call["dim"] is None:
        x, rank, axis = e.op("Reshape", x, e.ints(-1)), 1, 0
    else:
        axis = call.axis()
    ones = [1] * (rank + 1)
    repeated = e.op(
        "Expand",
        e.op("Unsqueeze", x, e.ints(axis + 1)),
        e.dims([*ones[: axis + 1], count, *ones[axis + 2 :]]),
    )
    # The axis and its copies become one; the axes behind have another place than before.
    shape = e.op("Shape", x)
    before = e.op("Slice", shape, e.ints(0), e.ints(axis))
    behind = e.op("Slice", shape, e.ints(axis + 1), e.ints(_END))
    return e.op("Reshape", repeated, e.op("Concat", before, e.ints(-1), behind, axis=0))


def roll(e: Emission, call: Call) -> ir.Value:
    """Entries pushed out at one end come back at the other."""
    x, dims = e.tensor(call["self"]), call["dims"]
    if not dims:
        flat = _rolled(e, e.op("Reshape", x, e.ints(-1)), 0, call["shifts"][0])
        return e.op("Reshape", flat, e.op("Shape", x))
    rank = call.out.ndim
    for shift, axis in zip(call["shifts"], dims, strict=True):
        size = call.out.shape[axis]
        known = isinstance(shift, int) and is_fixed(size)
        x = _rolled(e, x, axis % rank, shift % int(size) if known else shift)
    return x


def _rolled(e: Emission, x: ir.Value, axis: int, shift: Any) -> ir.Value:
    if shift == 0:
        return x
    # The last `shift` entries come first; a size that is not known yet is divided at run time.
    size = e.op("Shape", x, start=axis, end=axis + 1)
    cut = e.op("Mod", e.op("Neg", e.extent(shift)), size)
    head = e.op("Slice", x, cut, size, e.ints(axis))
    tail = e.op("Slice", x, e.ints(0), cut, e.ints(axis))
    return e.op("Concat", head, tail, axis=axis)


def flip(e: Emission, call: Call) -> ir.Value:
    """Axes read backwards."""
    axes = [axis % call.out.ndim for axis in call["dims"]]
    count = len(axes)
    bounds = (e.ints(*[-1] * count), e.ints(*[-_END] * count))
    return e.op("Slice", e.tensor(call["self"]), *bounds, e.ints(*axes), e.ints(*[-1] * count))


def clone(e: Emission, call: Call) -> ir.Value:
    """The same value: nothing is written in place."""
    source = call["self"]
    for layout in ("joined heads", "heads last"):
        if (source, layout) in e.views:
            e.views[call.node, layout] = e.views[source, layout]
    return e.tensor(source)


def _triangle(upper: int) -> Emitter:
    def emit(e: Emission, call: Call) -> ir.Value:
        return e.op("Trilu", e.tensor(call["self"]), e.scalar(call["diagonal"]), upper=upper)

    return emit


def pixel_shuffle(e: Emission, call: Call) -> ir.Value:
    """Channels become pixels."""
    size = int(call["upscale_factor"])
    return e.op("DepthToSpace", e.tensor(call["self"]), blocksize=size, mode="CRD")


EMITTERS: Mapping[Callable[..., Any], Emitter] = MappingProxyType(
    {
        aten.reshape.default: reshape,
        aten.transpose.int: transpose,
        aten.permute.default: permute,
        aten.unsqueeze.default: unsqueeze,
        aten.squeeze.dim: squeeze,
        aten.squeeze.dims: squeeze,
        aten.expand.default: expand,
        aten.slice.Tensor: slice_,
        aten.select.int: select,
        aten.cat.default: cat,
        aten.stack.default: stack,
        aten.split_with_sizes.default: split_with_sizes,
        aten.repeat.default: repeat,
        aten.repeat_interleave.self_int: repeat_interleave,
        aten.roll.default: roll,
        aten.flip.default: flip,
        aten.clone.default: clone,
        aten.tril.default: _triangle(0),
        aten.triu.default: _triangle(1),
        aten.pixel_shuffle.default: pixel_shuffle,
    }
)
"""Operator -> emitter."""
