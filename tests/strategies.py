"""Hypothesis strategies: random graphs of canonical operators, and random dependency graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx import Node

from lamella.ir.fake_values import fake_of
from lamella.ir.graph import Graph
from lamella.ir.signature import Signature
from lamella.ir.torch_private import FakeTensorMode, tree_flatten

aten = torch.ops.aten

WIDTH = 8
Step = tuple[str, int, int]

UNARY: dict[str, Callable[..., Tensor]] = {
    "relu": aten.relu.default,
    "tanh": aten.tanh.default,
    "neg": aten.neg.default,
    "sigmoid": aten.sigmoid.default,
}
BINARY: dict[str, Callable[..., Tensor]] = {
    "add": aten.add.Tensor,
    "mul": aten.mul.Tensor,
    "sub": aten.sub.Tensor,
}


def graph_of(inputs: dict[str, Tensor]) -> Graph:
    """A graph that returns its first input; edit it from there."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph = fx.Graph()
    nodes: list[Node] = []
    for name, value in inputs.items():
        node = graph.placeholder(name)
        node.meta["val"] = fake_of(value, mode)
        nodes.append(node)
    graph.output((nodes[0],))
    _, in_spec = tree_flatten(((), dict.fromkeys(inputs, 0)))
    _, out_spec = tree_flatten({"result": 0})
    signature = Signature(tuple(inputs), ("result",), in_spec, out_spec)
    return Graph(fx.GraphModule(torch.nn.Module(), graph), signature)


def returned(graph: Graph, node: Node) -> Graph:
    """`graph`, returning `node`, finished."""
    graph.set_outputs([node], graph.signature)
    graph.finish()
    return graph


@st.composite
def programs(draw: st.DrawFn, longest: int = 12) -> list[Step]:
    """Straight-line programs: operator and the places of its operands among earlier values."""
    steps: list[Step] = []
    names = [*UNARY, *BINARY, "linear", "rms_norm"]
    for place in range(draw(st.integers(1, longest))):
        operand = st.integers(0, place)
        steps.append((draw(st.sampled_from(names)), draw(operand), draw(operand)))
    return steps


def built(program: list[Step], seed: int = 0) -> Graph:
    """The graph of a program on one input ``x`` of shape ``[3, 8]``; dead steps are kept."""
    generator = torch.Generator().manual_seed(seed)
    graph = graph_of({"x": torch.zeros(3, WIDTH)})
    values = [graph.inputs[0]]
    for number, (name, left, right) in enumerate(program):
        values.append(_step(graph, name, (values[left], values[right]), number, generator))
    graph.set_outputs([values[-1]], graph.signature)
    return graph


def _step(
    graph: Graph, name: str, operands: tuple[Node, Node], number: int, generator: torch.Generator
) -> Node:
    left, right = operands
    output = graph.output
    if name in UNARY:
        return graph.call(UNARY[name], left, before=output)
    if name in BINARY:
        return graph.call(BINARY[name], left, right, before=output)
    if name == "rms_norm":
        return graph.call(aten.rms_norm.default, left, [WIDTH], None, 1e-6, before=output)
    data = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH
    weight = graph.add_weight(f"layer{number}.weight", data)
    return graph.call(aten.linear.default, left, weight, before=output)


def evaluated(program: list[Step], x: Tensor, seed: int = 0) -> Tensor:
    """What a program computes, in eager PyTorch and without any graph."""
    generator = torch.Generator().manual_seed(seed)
    values = [x]
    unary = {"relu": torch.relu, "tanh": torch.tanh, "neg": torch.neg, "sigmoid": torch.sigmoid}
    binary = {"add": torch.add, "mul": torch.mul, "sub": torch.sub}
    for name, left, right in program:
        a, b = values[left], values[right]
        if name in unary:
            values.append(unary[name](a))
        elif name in binary:
            values.append(binary[name](a, b))
        elif name == "rms_norm":
            values.append(torch.nn.functional.rms_norm(a, (WIDTH,), eps=1e-6))
        else:
            weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH
            values.append(a @ weight.T)
    return values[-1]


@st.composite
def dags(draw: st.DrawFn, longest: int = 15) -> list[list[int]]:
    """For every vertex of a random directed acyclic graph the earlier ones it reads."""
    return [
        draw(st.lists(st.integers(0, place - 1), max_size=3, unique=True)) if place else []
        for place in range(draw(st.integers(1, longest)))
    ]
