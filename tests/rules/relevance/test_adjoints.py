"""Rules of operators that are linear, pick winners or differentiate: against autograd."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lamella.ir import ops
from lamella.ir.operators import REFERENCE
from lamella.ir.ops import aten, lam
from lamella.ir.torch_private import tree_leaves, tree_map
from lamella.rules.relevance.presets import CP, GRADIENT
from lamella.rules.relevance.rule import Chosen, Place
from lamella.rules.relevance.slopes import SLOPES


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


X = draw(3, 4, 5)
IMAGE = draw(2, 3, 6, 7)
MASK = draw(3, 4, 5, seed=9) > 0
Case = tuple[Callable[..., Any], tuple[Any, ...]]

CASES: dict[str, Case] = {
    "add": (aten.add.Tensor, (X, draw(4, 1, seed=1), 2)),
    "sub": (aten.sub.Tensor, (draw(5, seed=1), X)),
    "rsub": (aten.rsub.Scalar, (X, 3.0)),
    "mul": (aten.mul.Tensor, (X, draw(3, 1, 5, seed=1))),
    "div": (aten.div.Tensor, (X, draw(4, 5, seed=1).abs() + 0.5)),
    "maximum": (aten.maximum.default, (X, draw(3, 4, 5, seed=1))),
    "minimum with ties": (aten.minimum.default, (X, torch.where(MASK, X, X + 1))),
    "where": (aten.where.self, (MASK, X, draw(3, 4, 5, seed=1))),
    "where with a number": (aten.where.ScalarSelf, (MASK, 2.0, X)),
    "masked fill": (aten.masked_fill.Scalar, (X, MASK, -3.0)),
    "masked fill with a tensor": (aten.masked_fill.Tensor, (X, MASK, draw(1, seed=1)[0])),
    "prelu": (aten.prelu.default, (IMAGE, draw(3, seed=1))),
    "power of a number": (aten.pow.Scalar, (2.0, X)),
    "power": (aten.pow.Tensor_Tensor, (X.abs() + 0.1, draw(5, seed=1))),
    "reshape": (aten.reshape.default, (X, [12, -1])),
    "transpose": (aten.transpose.int, (X, 0, -1)),
    "permute": (aten.permute.default, (X, [2, 0, -2])),
    "unsqueeze": (aten.unsqueeze.default, (X, -1)),
    "squeeze": (aten.squeeze.dim, (draw(3, 1, 4), 1)),
    "expand": (aten.expand.default, (draw(3, 1, 5), [2, -1, 4, -1])),
    "slice": (aten.slice.Tensor, (X, 1, 1, 3)),
    "slice from the end": (aten.slice.Tensor, (X, -1, -3, None)),
    "slice between ends": (aten.slice.Tensor, (X, -1, -4, -1)),
    "slice with steps": (aten.slice.Tensor, (X, 2, 1, 5, 2)),
    "slice that is everything": (aten.slice.Tensor, (X, 1, 0, 2**63 - 1)),
    "select": (aten.select.int, (X, 1, 2)),
    "select from the end": (aten.select.int, (X, -1, -2)),
    "cat": (aten.cat.default, ([X, draw(3, 2, 5, seed=1)], 1)),
    "stack": (aten.stack.default, ([X, draw(3, 4, 5, seed=1)], -1)),
    "repeat": (aten.repeat.default, (X, [2, 1, 3, 1])),
    "repeat each": (aten.repeat_interleave.self_int, (X, 3, 1)),
    "roll": (aten.roll.default, (X, [1, -2], [0, 2])),
    "flip": (aten.flip.default, (X, [0, 2])),
    "tril": (aten.tril.default, (X, -1)),
    "pixel shuffle": (aten.pixel_shuffle.default, (draw(2, 12, 3, 2), 2)),
    "pad": (aten.pad.default, (IMAGE, [1, 2, 0, 3])),
    "pad by less": (aten.pad.default, (IMAGE, [1, -2])),
    "pad by reflection": (aten.pad.default, (IMAGE, [2, 1, 3, 1], "reflect")),
    "pad by the edge": (aten.pad.default, (IMAGE, [2, 1, 0, 1], "replicate")),
    "pad in a circle": (aten.pad.default, (IMAGE, [2, 1, 0, 1], "circular")),
    "index": (aten.index.Tensor, (X, [ids(0, 2, 0), ids(1, 3, 1)])),
    "index of a later axis": (aten.index.Tensor, (X, [None, ids(3, 3, 0)])),
    "index by a mask": (aten.index.Tensor, (X, [MASK])),
    "index select": (aten.index_select.default, (X, 1, ids(3, 3, 0))),
    "gather": (aten.gather.default, (X, 2, ids(0, 4, 4).expand(3, 4, 3))),
    "index put": (aten.index_put.default, (X, [ids(0, 2)], draw(2, 4, 5, seed=1))),
    "index put that adds": (aten.index_put.default, (X, [ids(0, 0)], draw(2, 4, 5, seed=1), True)),
    "scatter": (aten.scatter.src, (X, 2, ids(0, 3).expand(3, 4, 2), draw(3, 4, 2, seed=1))),
    "scatter a number": (aten.scatter.value, (X, 2, ids(0, 3).expand(3, 4, 2), 7.0)),
    "scatter add": (
        aten.scatter_add.default,
        (X, 2, ids(3, 3).expand(3, 4, 2), draw(3, 4, 2, seed=1)),
    ),
    "topk": (aten.topk.default, (X, 2, 1)),
    "sort": (aten.sort.default, (X, -1, True)),
    "split": (aten.split_with_sizes.default, (X, [1, 3], 1)),
    "sum": (aten.sum.dim_IntList, (X, [0, -1])),
    "sum of all": (aten.sum.default, (X,)),
    "mean": (aten.mean.dim, (X, [1], True)),
    "mean of all": (aten.mean.default, (X,)),
    "amax": (aten.amax.default, (X.round(), [1, 2])),
    "amin": (aten.amin.default, (X.round(), [0], True)),
    "prod": (aten.prod.dim_int, (X, 1)),
    "cumsum": (aten.cumsum.default, (X, 1)),
    "var": (aten.var.correction, (X, [1])),
    "norm": (aten.linalg_vector_norm.default, (X, 2, [-1], True)),
    "norm of degree one": (aten.linalg_vector_norm.default, (X, 1, [-1])),
    "norm of degree three": (aten.linalg_vector_norm.default, (X, 3, [0])),
    "softmax": (aten.softmax.int, (X, 1)),
    "log softmax": (aten.log_softmax.int, (X, -1)),
    "layer norm": (aten.layer_norm.default, (X, [4, 5], draw(4, 5, seed=1), draw(4, 5, seed=2))),
    "layer norm without weights": (aten.layer_norm.default, (X, [5])),
    "rms norm": (aten.rms_norm.default, (X, [5], draw(5, seed=1), 1e-5)),
    "rms norm without epsilon": (aten.rms_norm.default, (X, [5])),
    "group norm": (
        aten.group_norm.default,
        (draw(2, 6, 3, 4), 3, draw(6, seed=1), draw(6, seed=2)),
    ),
    "batch norm": (
        aten.batch_norm.default,
        (
            IMAGE,
            draw(3, seed=1),
            draw(3, seed=2),
            draw(3, seed=3),
            draw(3, seed=4).abs(),
            False,
            0.1,
            1e-05,
            False,
        ),
    ),
    "max pooling": (aten.max_pool2d.default, (IMAGE, [3, 2], [1, 2], [1, 0])),
    "max pooling with winners": (
        aten.max_pool2d_with_indices.default,
        (IMAGE, [3, 2], [1, 2], [1, 0]),
    ),
    "average pooling": (aten.avg_pool2d.default, (IMAGE, [2, 3], [2, 1], [1, 1])),
    "average pooling of one axis": (aten.avg_pool1d.default, (X, [2])),
    "adaptive pooling to one": (aten.adaptive_avg_pool2d.default, (IMAGE, [1, 1])),
    "adaptive pooling with overlaps": (aten.adaptive_avg_pool2d.default, (IMAGE, [4, 3])),
    "adaptive pooling of one axis": (aten.adaptive_avg_pool1d.default, (X, [2])),
    "nearest": (aten.upsample_nearest2d.vec, (IMAGE, None, [2.0, 3.0])),
    "bilinear": (aten.upsample_bilinear2d.vec, (IMAGE, [9, 5], False, None)),
    "bicubic": (aten.upsample_bicubic2d.vec, (IMAGE, [9, 5], True, None)),
    "linear": (aten.linear.default, (X, draw(6, 5, seed=1), draw(6, seed=2))),
    "matmul": (aten.matmul.default, (draw(2, 1, 3, 4), draw(5, 4, 6, seed=1))),
    "matmul with a vector": (aten.matmul.default, (X, draw(5, seed=1))),
    "vector with a matmul": (aten.matmul.default, (draw(4), draw(3, 4, 5, seed=1))),
    "dot": (aten.matmul.default, (draw(4), draw(4, seed=1))),
    "einsum": (aten.einsum.default, ("bij,bkj->bik", [X, draw(3, 6, 5, seed=1)])),
    "einsum that sums": (aten.einsum.default, ("bij,kb->kj", [X, draw(6, 3, seed=1)])),
    "einsum of one": (aten.einsum.default, ("bij->jb", [X])),
    "conv1d": (
        aten.conv1d.default,
        (draw(2, 4, 9), draw(6, 2, 3, seed=1), None, [2], [1], [1], 2),
    ),
    "conv2d": (
        aten.conv2d.default,
        (IMAGE, draw(4, 3, 3, 2, seed=1), draw(4, seed=2), [2, 3], [1, 0], [1, 2], 1),
    ),
    "transposed convolution": (
        aten.conv_transpose2d.input,
        (IMAGE, draw(3, 4, 3, 2, seed=1), None, [2, 3], [1, 0], [1, 2], 1, [1, 1]),
    ),
    "experts": (lam.grouped_linear.default, (draw(6, 4), draw(3, 5, 4, seed=1), ids(2, 2, 5))),
    "rotary": (
        lam.rotary_embedding.default,
        (draw(2, 3, 4, 6), draw(4, 3).repeat(1, 2), draw(4, 3, seed=1).repeat(1, 2)),
    ),
    "rotary pairs": (
        lam.rotary_embedding.default,
        (draw(2, 4, 6), draw(4, 3).repeat_interleave(2, 1), draw(4, 3, seed=1), True),
    ),
    "selective scan": (
        lam.selective_scan.default,
        (
            draw(2, 3, 5),
            draw(2, 3, 5, seed=1).abs(),
            -draw(3, 4, seed=2).abs(),
            draw(2, 4, 5, seed=3),
            draw(2, 4, 5, seed=4),
        ),
    ),
    "scan of heads": (
        lam.head_scan.default,
        (
            draw(2, 5, 4, 3),
            draw(2, 5, 4, seed=1).abs(),
            -draw(4, seed=2).abs(),
            draw(2, 5, 2, 6, seed=3),
            draw(2, 5, 2, 6, seed=4),
        ),
    ),
    "attention": (
        aten.scaled_dot_product_attention.default,
        (
            draw(2, 4, 5, 6),
            draw(2, 4, 7, 6, seed=1),
            draw(2, 4, 7, 3, seed=2),
            draw(1, 1, 5, 7, seed=3),
            0.0,
            False,
            0.3,
        ),
    ),
    "causal attention": (
        aten.scaled_dot_product_attention.default,
        (draw(2, 4, 5, 6), draw(2, 4, 5, 6, seed=1), draw(2, 4, 5, 6, seed=2), None, 0.0, True),
    ),
    "attention in groups": (
        aten.scaled_dot_product_attention.default,
        (
            draw(2, 4, 5, 6),
            draw(2, 2, 5, 6, seed=1),
            draw(2, 2, 5, 6, seed=2),
            draw(5, 5, seed=5) > -1,
            0.0,
            False,
            None,
            True,
        ),
    ),
}
CASES["rotary pairs"] = (
    lam.rotary_embedding.default,
    (
        draw(2, 4, 6),
        draw(4, 3).repeat_interleave(2, 1),
        draw(4, 3, seed=1).repeat_interleave(2, 1),
        True,
    ),
)
CONSTANT = {"weight", "bias", "running_mean", "running_var", "cos", "sin", "attn_mask", "a"}
"""Operands that are no signals here; a coefficient for them is not looked at."""


def rule_of(target: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The rule of the gradient preset, as at a place where all operands are signals."""
    entry = GRADIENT.table[target]
    if not isinstance(entry, Chosen):
        return entry
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"x{place}") for place in range(count)]
    given = ("", nodes) if target is aten.einsum.default else tuple(nodes)
    node = graph.call_function(target, given)
    from lamella.rules.relevance.roles import Role

    return entry.choose(Place(node, dict.fromkeys(nodes, Role.SIGNAL)))


def call(function: Callable[..., Any], target: Any, args: Any) -> Any:
    """Call with arguments in the order of the schema, some of which have to be named."""
    schema = target._schema.arguments
    by_name = {a.name: v for a, v in zip(schema, args, strict=False) if a.kwarg_only}
    return function(*args[: len(args) - len(by_name)], **by_name)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_preset_is_the_adjoint(case: str):
    target, args = CASES[case]
    names = ops.argument_names(target)
    leaves = [
        one if name.startswith("running") else tree_map(_leaf, one)
        for name, one in zip(names, args, strict=False)
    ]
    output = call(REFERENCE.get(target, target), target, leaves)
    outputs = [one for one in tree_leaves(output) if _is_float(one)]
    coefficients = [
        torch.randn_like(one, generator=torch.Generator().manual_seed(20 + i))
        for i, one in enumerate(outputs)
    ]
    defaults = ops.argument_defaults(target)
    whole = [*args, *(defaults.get(name) for name in names[len(args) :])]
    results = call(target, target, args)
    count = len([a for a in tree_leaves(list(args)) if isinstance(a, Tensor)])
    rule = rule_of(target, max(count, 2) if target is not aten.einsum.default else count)
    if isinstance(results, Tensor):
        found = rule(coefficients[0], results, *whole)
    else:
        filled = coefficients + [None] * (len(results) - len(coefficients))
        found = rule(tuple(filled), tuple(results), *whole)
    assert len(found) == len(names)
    checked = 0
    for name, leaf, got in zip(names, leaves, found, strict=False):
        if name in CONSTANT:
            continue
        parts = zip(leaf, got, strict=True) if isinstance(leaf, list) and got else [(leaf, got)]
        for one, coefficient in parts:
            if not _is_float(one):
                continue
            want = torch.autograd.grad(outputs, one, coefficients, retain_graph=True)[0]
            # Up to a hundred products in float64.
            torch.testing.assert_close(coefficient, want, rtol=1e-10, atol=1e-11)
            checked += 1
    assert checked


def _leaf(value: Any) -> Any:
    return value.clone().requires_grad_() if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("target", SLOPES, ids=str)
def test_the_tangent_is_the_derivative(target: Any):
    more = {aten.clamp.default: (-0.5, 0.7), aten.pow.Tensor_Scalar: (3,)}.get(target, ())
    x = torch.linspace(-4.1, 4.3, 97, dtype=torch.float64)
    x = x.abs() if target in _POSITIVE | _LOGARITHMS else x
    x = (x * 0.2 if target in _BOUNDED else x).requires_grad_()
    y = target(x, *more)
    (want,) = torch.autograd.grad(y.sum(), x)
    got = SLOPES[target].tangent(y.detach(), x.detach(), *more)
    # Closed forms of the same function; PyTorch has the sixth of hardsigmoid in float32.
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12)


_POSITIVE = {aten.sqrt.default, aten.rsqrt.default, aten.log1p.default}
_LOGARITHMS = {aten.log.default, aten.log2.default, aten.log10.default}
_BOUNDED = {aten.asin.default, aten.acos.default, aten.atanh.default}
_CENTRED = {
    aten.acos.default: math.pi / 2,
    aten.cosh.default: 1.0,
    aten.sigmoid.default: 0.5,
    aten.hardsigmoid.default: 0.5,
    aten.softplus.default: 0.6931471805599453,
    aten.exp.default: 1.0,
    aten.cos.default: 1.0,
}


# A logarithm has no value at zero.
@pytest.mark.parametrize(
    "target", [target for target in SLOPES if target not in _LOGARITHMS], ids=str
)
def test_the_secant_leads_to_the_value_at_zero(target: Any):
    more = {aten.clamp.default: (-0.5, 0.7), aten.pow.Tensor_Scalar: (3,)}.get(target, ())
    x = torch.tensor([-30.0, -2.0, -3e-3, -1e-9, 1e-9, 2e-3, 0.4, 5.0, 30.0], dtype=torch.float64)
    x = x.abs() if target in _POSITIVE else x
    x = x / 31 if target in _BOUNDED else x
    y = target(x, *more)
    slope = SLOPES[target].secant(y, x, *more)
    # Near zero the difference to the value at zero cancels.
    torch.testing.assert_close(slope * x, y - _CENTRED.get(target, 0.0), rtol=1e-9, atol=1e-12)
    at_zero = torch.zeros(1, dtype=torch.float64)
    if target not in (aten.rsqrt.default, aten.reciprocal.default):
        assert bool(torch.isfinite(SLOPES[target].secant(target(at_zero, *more), at_zero, *more)))


@pytest.mark.parametrize("preset", [GRADIENT, CP], ids=lambda preset: preset.name)
def test_rules_take_the_arguments_of_their_operators(preset: Any):
    for target, entry in preset.table.items():
        if isinstance(entry, Chosen):
            continue
        arguments = [None] * len(ops.argument_names(target))
        inspect.signature(entry).bind(None, None, *arguments)
