"""Random graphs: canonicalizing keeps the values, ends, and leaves nothing to do."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.rewrite.canonicalize import canonicalize, noncanonical
from tests.unit.written import check_values, graph_of, random, run

aten = torch.ops.aten
X, Y = random(2, 3, 8), random(2, 3, 8, seed=1)
LARGER = [random(4, 5, 8, seed=2), random(4, 5, 8, seed=3)]

Build = Callable[[Callable[..., Node], Node, Node], Node]
"""From two values ``[batch, length, 8]`` to a third; the first argument adds a call."""


def _attention(call: Callable[..., Node], x: Node, y: Node) -> Node:
    scores = call(aten.bmm.default, x, call(aten.transpose.int, y, -1, -2))
    scaled = call(aten.div.Tensor, scores, 2.0)
    return call(aten.bmm.default, call(aten.softmax.int, scaled, -1), y)


def _rms(call: Callable[..., Node], x: Node, y: Node) -> Node:
    mean = call(aten.mean.dim, call(aten.square.default, x), [-1], True)
    return call(aten.mul.Tensor, x, call(aten.rsqrt.default, call(aten.add.Tensor, mean, 1e-3)))


def _center(call: Callable[..., Node], x: Node, y: Node) -> Node:
    centered = call(aten.sub.Tensor, x, call(aten.mean.dim, x, [-1], True))
    variance = call(aten.mean.dim, call(aten.pow.Tensor_Scalar, centered, 2), [-1], True)
    return call(
        aten.div.Tensor, centered, call(aten.sqrt.default, call(aten.add.Tensor, variance, 0.1))
    )


def _swap(call: Callable[..., Node], x: Node, y: Node) -> Node:
    first = call(aten.slice.Tensor, x, 2, 0, 4)
    second = call(aten.slice.Tensor, x, -1, 4, 2**63 - 1)
    return call(aten.cat.default, [call(aten.neg.default, second), first], -1)


def _rotary(call: Callable[..., Node], x: Node, y: Node) -> Node:
    turned = call(aten.mul.Tensor, _swap(call, x, y), call(aten.sin.default, y))
    return call(aten.add.Tensor, call(aten.mul.Tensor, x, call(aten.cos.default, y)), turned)


def _rows(call: Callable[..., Node], x: Node, y: Node) -> Node:
    flat = call(aten.view.default, call(aten.contiguous.default, x), [-1, 8])
    other = call(aten.reshape.default, y, [-1, 8])
    total = call(aten.relu.default, call(aten.add.Tensor, flat, other))
    size = call(aten.sym_size.int, y, 0)
    return call(aten.reshape.default, total, [size, -1, 8])


def _written(call: Callable[..., Node], x: Node, y: Node) -> Node:
    fresh = call(aten.mul.Tensor, x, 1.5)
    part = call(aten.slice.Tensor, fresh, 2, 2, 5)
    call(aten.add_.Tensor, part, 1.0)
    return call(aten.sub.Tensor, fresh, y)


def _masked(call: Callable[..., Node], x: Node, y: Node) -> Node:
    ones = call(aten.new_ones.default, x, [], dtype=torch.bool)
    both = call(aten.__and__.Tensor, call(aten.gt.Tensor, x, y), ones)
    return call(aten.where.self, both, x, call(aten.zeros_like.default, y))


BUILDS: dict[str, Build] = {
    "attention": _attention,
    "rms": _rms,
    "center": _center,
    "swap": _swap,
    "rotary": _rotary,
    "rows": _rows,
    "written": _written,
    "masked": _masked,
    "add": lambda call, x, y: call(aten.add.Tensor, x, y, alpha=2),
    "mul": lambda call, x, y: call(aten.mul.Tensor, x, y),
    "zero": lambda call, x, y: call(aten.add.Tensor, call(aten.mul.Tensor, x, 1.0), 0),
    "silu": lambda call, x, y: call(aten.mul.Tensor, call(aten.sigmoid.default, x), x),
    "views": lambda call, x, y: call(
        aten.squeeze.dim, call(aten.unsqueeze.default, call(aten.clone.default, x), 1), 1
    ),
    "turns": lambda call, x, y: call(
        aten.permute.default, call(aten.transpose.int, x, 0, 2), [2, 1, 0]
    ),
    "cast": lambda call, x, y: call(aten.type_as.default, call(aten.to.dtype, x, torch.float32), y),
    "chunk": lambda call, x, y: call(
        aten.cat.default,
        [call(operator.getitem, call(aten.chunk.default, x, 2, -1), i) for i in (1, 0)],
        -1,
    ),
}


@functools.cache
def _empty() -> Graph:
    return graph_of(lambda a, b: (a * 1, b * 1), X, Y, dynamic={"a": (0, 1), "b": (0, 1)})


def _random_graph(steps: list[tuple[str, int, int]]) -> Graph:
    graph = _empty().copy()
    values: list[Any] = list(graph.inputs)

    def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return graph.call(target, *args, before=graph.output, **kwargs)

    for name, one, two in steps:
        bounded = call(aten.tanh.default, values[one % len(values)])
        values.append(BUILDS[name](call, bounded, values[two % len(values)]))
    graph.set_outputs([values[-1], values[len(values) // 2]], graph.signature)
    graph.finish()
    return graph


STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(BUILDS)), st.integers(0, 9), st.integers(0, 9)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STEPS)
def test_values_stay_at_every_size_and_nothing_is_left_to_do(steps: list[Any]) -> None:
    graph = _random_graph(steps)
    before = graph.copy()
    canonicalize(graph)
    assert noncanonical(graph) == {}
    for inputs in ([X, Y], LARGER):
        for got, expected in zip(run(graph, *inputs), run(before, *inputs), strict=True):
            # Casts to single precision on the way: what is rounded may be rounded elsewhere.
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    check_values(graph)
    code = graph.module.code
    assert not any(canonicalize(graph).counts.values())
    assert graph.module.code == code


def test_every_step_is_canonicalized_alone() -> None:
    for name in BUILDS:
        graph = _random_graph([(name, 0, 1)])
        expected = run(graph.copy(), X, Y)
        canonicalize(graph)
        assert noncanonical(graph) == {}, name
        for got, one in zip(run(graph, X, Y), expected, strict=True):
            torch.testing.assert_close(got, one, rtol=1e-6, atol=1e-6, msg=name)
