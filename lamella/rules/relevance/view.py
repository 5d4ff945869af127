"""Adjoints of operators that move, repeat, cut and join values: exact in every preset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from lamella.ir.ops import aten
from lamella.rules.relevance.broadcast import full_like, is_one, sum_to
from lamella.rules.relevance.rule import Coefficients, Rule, straight

Target = Callable[..., Any]

_END = 1 << 62
"""Ends of slices at least this large mean the end of the axis."""


def shaped_back(coefficient: Any, output: Any, self: Any, *rest: Any) -> Coefficients:
    """Reshape, squeeze, unsqueeze: to the shape of the operand."""
    return (aten.reshape.default(coefficient, list(self.shape)), *(None,) * len(rest))


def transpose(coefficient: Any, output: Any, self: Any, dim0: int, dim1: int) -> Coefficients:
    """The same axes once more."""
    return aten.transpose.int(coefficient, dim0, dim1), None, None


def permute(coefficient: Any, output: Any, self: Any, dims: Any) -> Coefficients:
    """The inverse order."""
    order = [int(axis) % self.ndim for axis in dims]
    back = [order.index(axis) for axis in range(self.ndim)]
    return aten.permute.default(coefficient, back), None


def unsqueeze(coefficient: Any, output: Any, self: Any, dim: int) -> Coefficients:
    """The new axis goes."""
    return aten.squeeze.dim(coefficient, int(dim) % output.ndim), None


def expand(coefficient: Any, output: Any, self: Any, *rest: Any) -> Coefficients:
    """The sum over what was repeated."""
    return (sum_to(coefficient, self), *(None,) * len(rest))


def slice_(  # noqa: PLR0913  (the arguments of the operator)
    coefficient: Any,
    output: Any,
    self: Any,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Coefficients:
    """Zeros where nothing was taken."""
    axis = int(dim) % self.ndim
    size, count = self.shape[axis], coefficient.shape[axis]
    if step != 1:
        coefficient, count = _spread(coefficient, axis, step), count * step
    before, after = _outside(size, count, start, end)
    return _padded(coefficient, axis, before, after), None, None, None, None


def _outside(size: Any, count: Any, start: Any, end: Any) -> tuple[Any, Any]:
    """How many entries before and after were left out of a slice."""
    to_end = end is None or (isinstance(end, int) and (end >= _END or same(end, size)))
    if start is None or is_zero(start):
        return 0, size - count
    if isinstance(start, int) and start < 0:
        if to_end:
            return size - count, 0
        if isinstance(end, int) and end < 0:
            return size - count + end, -end
        return size + start, -start - count
    return start, size - start - count


def same(left: Any, right: Any) -> bool:
    """Whether two sizes are the same number."""
    return isinstance(left, int) and isinstance(right, int) and left == right


def is_zero(number: Any) -> bool:
    """Whether a size is known to be zero."""
    return isinstance(number, int) and number == 0


def _spread(value: Any, axis: int, step: int) -> Any:
    """Every entry followed by ``step - 1`` zeros."""
    apart = aten.unsqueeze.default(value, axis + 1)
    wide = _padded(apart, axis + 1, 0, step - 1)
    shape = list(value.shape)
    shape[axis] = shape[axis] * step
    return aten.reshape.default(wide, shape)


def _padded(value: Any, axis: int, before: Any, after: Any) -> Any:
    if is_zero(before) and is_zero(after):
        return value
    return aten.pad.default(value, [0, 0] * (value.ndim - 1 - axis) + [before, after])


def select(coefficient: Any, output: Any, self: Any, dim: int, index: Any) -> Coefficients:
    """Zeros beside the entry that was taken."""
    axis = int(dim) % self.ndim
    size = self.shape[axis]
    before = index
    if isinstance(index, int) and index < 0:
        before = size + index
    wide = aten.unsqueeze.default(coefficient, axis)
    return _padded(wide, axis, before, size - before - 1), None, None


def cat(coefficient: Any, output: Any, tensors: Any, dim: int = 0) -> Coefficients:
    """The parts."""
    axis, start = int(dim) % output.ndim, 0
    found: list[Any] = []
    for tensor in tensors:
        end = start + tensor.shape[axis]
        found.append(aten.slice.Tensor(coefficient, axis, start, end))
        start = end
    return found, None


def stack(coefficient: Any, output: Any, tensors: Any, dim: int = 0) -> Coefficients:
    """The parts."""
    axis = int(dim) % output.ndim
    return [aten.select.int(coefficient, axis, place) for place in range(len(tensors))], None


def split(coefficient: Any, output: Any, self: Any, sizes: Any, dim: int = 0) -> Coefficients:
    """The parts joined."""
    return aten.cat.default(list(coefficient), int(dim) % self.ndim), None, None


def repeat(coefficient: Any, output: Any, self: Any, repeats: Any) -> Coefficients:
    """The sum over the copies."""
    extra = len(repeats) - self.ndim
    shape: list[Any] = []
    copies: list[int] = []
    for place, count in enumerate(repeats):
        if place < extra or not is_one(count):
            copies.append(len(shape))
            shape.append(count)
        if place >= extra:
            shape.append(self.shape[place - extra])
    if not copies:
        return coefficient, None
    return aten.sum.dim_IntList(aten.reshape.default(coefficient, shape), copies), None


def repeat_interleave(
    coefficient: Any,
    output: Any,
    self: Any,
    repeats: Any,
    dim: Any = None,
    output_size: Any = None,
) -> Coefficients:
    """The sum over the copies, which stand side by side."""
    shape = list(self.shape)
    axis = self.ndim - 1 if dim is None else int(dim) % self.ndim
    shape.insert(axis + 1, repeats)
    apart = aten.reshape.default(coefficient, shape)
    return aten.sum.dim_IntList(apart, [axis + 1]), None, None, None


def roll(coefficient: Any, output: Any, self: Any, shifts: Any, dims: Any = ()) -> Coefficients:
    """The other way."""
    return aten.roll.default(coefficient, [-shift for shift in shifts], dims), None, None


def flip(coefficient: Any, output: Any, self: Any, dims: Any) -> Coefficients:
    """Once more."""
    return aten.flip.default(coefficient, dims), None


def triangle(target: Target) -> Rule:
    """`tril` and `triu`: the same triangle of the coefficient."""

    def rule(coefficient: Any, output: Any, self: Any, diagonal: int = 0) -> Coefficients:
        return target(coefficient, diagonal), None

    return rule


def pixel_shuffle(coefficient: Any, output: Any, self: Any, upscale_factor: int) -> Coefficients:
    """Pixels back to channels."""
    factor, shape = int(upscale_factor), list(self.shape)
    lead, rank = len(shape) - 3, len(shape)
    height, width = shape[-2], shape[-1]
    wide = [*shape[:lead], int(shape[lead]) // factor**2, height, factor, width, factor]
    apart = aten.reshape.default(coefficient, wide)
    order = [*range(lead + 1), lead + 2, lead + 4, lead + 1, lead + 3]
    assert len(order) == rank + 2
    return aten.reshape.default(aten.permute.default(apart, order), shape), None


def pad(
    coefficient: Any, output: Any, self: Any, pad: Any, mode: Any = "constant", value: Any = None
) -> Coefficients:
    """What was added goes; entries that were copied there go back to where they came from."""
    if not isinstance(mode, str) or mode == "constant":
        found = aten.pad.default(coefficient, [amount * -1 for amount in pad])
    else:
        found = _folded(coefficient, self, list(pad), mode)
    return found, None, None, None


def constant_pad(
    coefficient: Any, output: Any, self: Any, pad: Any, value: Any = 0
) -> Coefficients:
    """As `pad` with a constant."""
    return aten.pad.default(coefficient, [amount * -1 for amount in pad]), None, None


def _folded(coefficient: Any, self: Any, amounts: list[Any], mode: str) -> Any:
    """Axis by axis, every padded place is added to the place that it is a copy of."""
    for pair in range(len(amounts) // 2):
        axis = self.ndim - 1 - pair
        size = self.shape[axis]
        shape = [*coefficient.shape[:axis], size, *coefficient.shape[axis + 1 :]]
        line = aten.arange.start_step(0, size, 1, dtype=torch.float32)
        row = aten.reshape.default(line, [1, 1, size])
        amount = amounts[2 * pair : 2 * pair + 2]
        origin = aten.pad.default(row, amount, mode)
        places = aten.reshape.default(aten.to.dtype(origin, torch.int64), [coefficient.shape[axis]])
        zeros = aten.full.default(shape, 0.0, dtype=coefficient.dtype)
        indices = [*[None] * axis, places]
        coefficient = aten.index_put.default(zeros, indices, coefficient, True)
    return coefficient


def zeros_for(value: Any) -> Any:
    """A coefficient of zero for `value`."""
    return full_like(value, 0.0)


VIEWS: Mapping[Target, Rule] = MappingProxyType(
    {
        aten.reshape.default: shaped_back,
        aten.squeeze.dim: shaped_back,
        aten.squeeze.dims: shaped_back,
        aten.unsqueeze.default: unsqueeze,
        aten.transpose.int: transpose,
        aten.permute.default: permute,
        aten.expand.default: expand,
        aten.slice.Tensor: slice_,
        aten.select.int: select,
        aten.cat.default: cat,
        aten.stack.default: stack,
        aten.split_with_sizes.default: split,
        aten.repeat.default: repeat,
        aten.repeat_interleave.self_int: repeat_interleave,
        aten.roll.default: roll,
        aten.flip.default: flip,
        aten.clone.default: straight,
        aten.pad.default: pad,
        aten.constant_pad_nd.default: constant_pad,
        aten.tril.default: triangle(aten.tril.default),
        aten.triu.default: triangle(aten.triu.default),
        aten.pixel_shuffle.default: pixel_shuffle,
    }
)
"""Operator -> rule."""
