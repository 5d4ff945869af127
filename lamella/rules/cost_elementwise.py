"""Cost of operators that work element by element, move data, or reduce.

An addition, multiplication or comparison is 1 operation per element, a division or root 4, an
exponential, logarithm or trigonometric function 8 (about what a vector unit takes). These
constants matter little: contractions are nearly all of the work.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lamella.ir.ops import CANONICAL, aten, lam
from lamella.rules.work import Call, Work, product

CostRule = Callable[[Call], Work]
Target = Callable[..., Any]

SIMPLE = 1
ROOT = 4
TRANSCENDENTAL = 8
SOFTMAX = 3 + TRANSCENDENTAL + ROOT
"""Per element: maximum, difference, exponential, sum, division."""


def per_output(flops: int) -> CostRule:
    """`flops` operations for each element of the result."""
    return lambda call: call.work(flops * call.output_size)


def per_input(flops: int) -> CostRule:
    """`flops` operations for each element of the first operand."""

    def rule(call: Call) -> Work:
        first = next(iter(call.node.all_input_nodes), None)
        return call.work(flops * product(call.shape_of(first)) if first is not None else 0)

    return rule


def nothing(call: Call) -> Work:
    """A view, or integer arithmetic on shapes: no data moves."""
    return Work()


def copy(call: Call) -> Work:
    """The result is written, and as much is read."""
    written = call.written_bytes()
    return Work(read_bytes=written, written_bytes=written)


def fill(call: Call) -> Work:
    """The result is written."""
    return Work(written_bytes=call.written_bytes())


def gather(call: Call) -> Work:
    """Elements are picked: as many are read as are written, and the indices."""
    source, *indices = call.node.all_input_nodes
    written = call.written_bytes()
    read = call.bytes_of(node for node in indices if node.op != "get_attr")
    if source.op == "get_attr":
        return Work(read_bytes=read, written_bytes=written, weight_bytes=written)
    return Work(read_bytes=written + read, written_bytes=written)


def scatter(call: Call) -> Work:
    """The first operand is copied, and the elements that are put in are read."""
    return call.work(0)


def ordering(call: Call) -> Work:
    """Sorting `n` elements along an axis: ``10 * n``, a stand-in for ``n log n``."""
    return per_input(10)(call)


def rotary(call: Call) -> Work:
    """Two products and a sum for each element."""
    return call.work(3 * call.output_size)


_COPIES = (
    *(aten.cat.default, aten.stack.default, aten.pad.default, aten.constant_pad_nd.default),
    *(aten.repeat.default, aten.repeat_interleave.self_int, aten.roll.default, aten.flip.default),
    *(aten.clone.default, aten.tril.default, aten.triu.default, aten.pixel_shuffle.default),
)
_ROOTS = (
    *(aten.div.Tensor, aten.div.Tensor_mode, aten.floor_divide.default, aten.sqrt.default),
    *(aten.rsqrt.default, aten.reciprocal.default, aten.remainder.Scalar, aten.remainder.Tensor),
)
_TRANSCENDENTALS = (
    *(aten.exp.default, aten.log.default, aten.log1p.default, aten.erf.default),
    *(aten.sin.default, aten.cos.default, aten.tanh.default, aten.atan.default),
    *(aten.sigmoid.default, aten.silu.default, aten.gelu.default, aten.softplus.default),
    *(aten.elu.default, aten.mish.default, aten.pow.Scalar, aten.pow.Tensor_Tensor),
)
_REDUCTIONS: Mapping[Target, int] = {
    aten.var.correction: 3,
    aten.linalg_vector_norm.default: 2,
}


def _of_category(category: str, rule: CostRule) -> dict[Target, CostRule]:
    return {target: rule for target, facts in CANONICAL.items() if facts.category == category}


ELEMENTWISE: Mapping[Target, CostRule] = {
    **_of_category("elementwise", per_output(SIMPLE)),
    **dict.fromkeys(_ROOTS, per_output(ROOT)),
    **dict.fromkeys(_TRANSCENDENTALS, per_output(TRANSCENDENTAL)),
    lam.rotary_embedding.default: rotary,
    # A division, five steps of one operation; a logarithm and an exponential.
    lam.round_uniform.default: per_output(ROOT + 5 * SIMPLE),
    lam.round_log.default: per_output(2 * TRANSCENDENTAL + ROOT + 5 * SIMPLE),
    **_of_category("cast", per_output(0)),
}
"""One pass over the elements."""

MOVING: Mapping[Target, CostRule] = {
    **_of_category("view", nothing),
    **dict.fromkeys(_COPIES, copy),
    **_of_category("creation", fill),
    **_of_category("shape", nothing),
    operator.getitem: nothing,
    torch.sym_max: nothing,
    aten.index.Tensor: gather,
    aten.gather.default: gather,
    aten.index_select.default: gather,
    aten.index_put.default: scatter,
    aten.scatter.src: scatter,
    aten.scatter.value: scatter,
    aten.scatter_add.default: scatter,
}
"""No arithmetic: views, copies, picked elements, shapes."""

REDUCING: Mapping[Target, CostRule] = {
    **_of_category("reduction", per_input(SIMPLE)),
    **{target: per_input(flops) for target, flops in _REDUCTIONS.items()},
    **_of_category("softmax", per_input(SOFTMAX)),
    **_of_category("ordering", ordering),
}
"""Many elements to one, or compared with each other."""

VIEWS: frozenset[Any] = frozenset(target for target, rule in MOVING.items() if rule is nothing)
"""Operators whose result shares the memory of their operand, or that have none."""
