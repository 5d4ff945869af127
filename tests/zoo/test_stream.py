"""The blocks of every family: as many as the config says, of the right kinds, and droppable."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Node

from lamella.ir.bypass import bypass
from lamella.ir.graph import Graph
from lamella.ir.kinds import CONTRACTIONS
from lamella.ir.reach import base_name
from lamella.ir.stream import Sublayer
from lamella.ir.verify import verify
from tests.conftest import family_of
from tests.strategies import graph_of, returned
from tests.zoo.families import EXTRA
from tests.zoo.test_capture import relative_error

aten = torch.ops.aten

GAPS = {"swin": 1, "convnext": 1}
"""Families whose stages are joined by layers that are no branch."""


def assert_kinds(name: str, graph: Graph, model: nn.Module) -> None:
    assert tuple(block.kinds for block in graph.blocks) == family_of(name).kinds(model)


def test_blocks_are_those_of_the_config(family, captured, model) -> None:
    assert_kinds(family, captured(family), model(family))


def test_blocks_are_found_before_canonicalization(family, raw, model) -> None:
    assert_kinds(family, raw(family), model(family))


@pytest.mark.parametrize("extra", EXTRA)
def test_further_streams_are_understood(extra, captured, raw, model) -> None:
    assert_kinds(extra, captured(extra), model(extra))
    assert_kinds(extra, raw(extra), model(extra))


def test_names_of_weights_decide_nothing(family, captured, model) -> None:
    graph = captured(family)
    for number, node in enumerate(graph.weight_nodes()):
        node.target = f"w{number}"
    assert_kinds(family, graph, model(family))
    assert [block.name for block in graph.blocks] == [f"block.{b.index}" for b in graph.blocks]


def test_every_block_is_called_by_its_number(family, captured) -> None:
    names = [block.name for block in captured(family).blocks]
    assert len(set(names)) == len(names)
    assert all(name.rpartition(".")[2].isdigit() for name in names)


def test_blocks_follow_each_other(family, captured) -> None:
    graph = captured(family)
    pairs = itertools.pairwise(graph.blocks)
    same = [(a, b) for a, b in pairs if a.sublayers[0].spine == b.sublayers[0].spine]
    joined = sum(a.exit is b.entry for a, b in same)
    assert joined == len(same) - GAPS.get(family, 0)


def test_regions_are_disjoint_and_hold_the_layers(family, captured) -> None:
    graph = captured(family)
    owned = Counter(node for s in graph.stream.sublayers for node in s.nodes)
    assert set(owned.values()) == {1}
    for sublayer in graph.stream.sublayers:
        assert sublayer.side_outputs == ()
        assert any(base_name(node) in CONTRACTIONS for node in sublayer.nodes)
        assert sublayer.entry not in sublayer.nodes
        assert sublayer.branch in sublayer.nodes


def test_only_projected_shortcuts_stay(family, captured) -> None:
    fixed = [s.index for s in captured(family).stream.sublayers if not s.droppable]
    # The first block of the second stage of a ResNet halves the image.
    assert fixed == ([2] if family == "resnet" else [])


# ---- dropping -----------------------------------------------------------------------------


def picks(count: int) -> list[list[int]]:
    """Places of sublayers to drop: the first, the last, two in the middle, all."""
    return [[0], [count - 1], [count // 2, count // 2 + 1], list(range(count))]


def without(model: nn.Module, chosen: Sequence[Sublayer], every: Sequence[Sublayer]) -> nn.Module:
    """The eager model with every weight of the branches zero, and post-norms that go removed.

    With its weights and biases zero a branch is zero, whatever it does.
    """
    mine = {str(n.target) for s in chosen for n in s.nodes if n.op == "get_attr"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in mine:
                parameter.zero_()
    arms = Counter(sublayer.exit for sublayer in every)
    gone = Counter(sublayer.exit for sublayer in chosen)
    for sublayer in chosen:
        if gone[sublayer.exit] == arms[sublayer.exit]:
            for norm in sublayer.tail:
                _remove(model, norm)
    return model


def _remove(model: nn.Module, norm: Node) -> None:
    weights = [source for source in norm.all_input_nodes if source.op == "get_attr"]
    if weights:
        owner, _, leaf = str(weights[0].target).rpartition(".")[0].rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Identity())


SHARING = {"albert"}
"""Blocks with the weights of other blocks: one of them can't be zeroed alone."""


def assert_dropping_is_zeroing(name: str, captured, model) -> None:
    known = family_of(name)
    batch, sequence = known.sizes()[1]
    inputs = known.inputs(batch, sequence, seed=3)
    count = sum(sublayer.droppable for sublayer in captured(name).stream.sublayers)
    for pick in picks(count):
        graph = captured(name)
        every = [sublayer for sublayer in graph.stream.sublayers if sublayer.droppable]
        chosen = [every[place] for place in pick if place < count]
        eager = without(model(name), chosen, every)
        heavy = sum(base_name(n) in CONTRACTIONS for s in chosen for n in s.nodes)
        before = sum(base_name(node) in CONTRACTIONS for node in graph.nodes)
        bypass(graph, chosen)
        graph.finish()
        verify(graph)
        after = sum(base_name(node) in CONTRACTIONS for node in graph.nodes)
        # A dropped branch is not computed any more.
        assert before - after >= heavy
        with torch.no_grad():
            expected = eager(**inputs)
        # Raised operators add up in another order than the idioms: rounding of float32.
        assert relative_error(graph(**inputs), expected) <= 1e-5, [s.name for s in chosen]


def test_dropping_a_branch_is_zeroing_it(family, captured, model) -> None:
    assert_dropping_is_zeroing(family, captured, model)


@pytest.mark.parametrize("extra", [name for name in EXTRA if name not in SHARING])
def test_dropping_a_branch_of_further_streams_is_zeroing_it(extra, captured, model) -> None:
    assert_dropping_is_zeroing(extra, captured, model)


def test_the_work_of_finding_a_stream_grows_with_its_length() -> None:
    graphs = [deep_graph(blocks, width=8, filler=110) for blocks in (20, 80)]
    assert len(graphs[1].nodes) > 10_000
    fewer, more = (_steps_to_find(graph) for graph in graphs)
    # Four times the blocks. What is paid once for a graph makes it less than four times the
    # work; sorting may make it a little more.
    assert more <= 4.2 * fewer
    assert [len(graph.blocks) for graph in graphs] == [20, 80]


def _steps_to_find(graph: Graph) -> int:
    """Lines of Python that run while the stream is found; each turn of a loop is one."""
    lines = 0

    def traced(_frame: object, event: str, _value: object) -> Callable[..., Any]:
        nonlocal lines
        lines += event == "line"
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        assert graph.stream
    finally:
        sys.settrace(before)
    return lines


def deep_graph(blocks: int, width: int, filler: int) -> Graph:
    """Attention and MLP over and over, with `filler` cheap operators in each block."""
    graph = graph_of({"x": torch.zeros(1, 1, 3, width)})
    weight = graph.add_weight("w", torch.zeros(width, width))
    x = graph.inputs[0]

    def call(target, *args, like) -> Node:
        return graph.call(target, *args, before=graph.output, like=like)

    for _ in range(blocks):
        y = x
        for _ in range(filler):
            y = call(aten.relu.default, y, like=x)
        y = call(aten.scaled_dot_product_attention.default, y, y, y, like=x)
        x = call(aten.add.Tensor, x, y, like=x)
        y = call(aten.linear.default, x, weight, like=x)
        for _ in range(filler // 10):
            y = call(aten.gelu.default, y, like=x)
        y = call(aten.linear.default, y, weight, like=x)
        x = call(aten.add.Tensor, x, y, like=x)
    return returned(graph, x)
