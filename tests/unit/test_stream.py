"""Residual streams of hand-written networks, one peculiarity each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional

from lamella.errors import GraphError
from lamella.ir.blocks import block_labels, group
from lamella.ir.bypass import bypass
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.reach import Reach
from lamella.rewrite.canonicalize import canonicalize
from tests.strategies import built, dags, graph_of, programs

aten = torch.ops.aten
WIDTH = 16
X = torch.linspace(-1, 1, 2 * 5 * WIDTH).reshape(2, 5, WIDTH)
IMAGE = torch.linspace(-1, 1, 2 * WIDTH * 8 * 8).reshape(2, WIDTH, 8, 8)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, states: Tensor | None = None) -> Tensor:
        source = x if states is None else states
        heads = [
            layer(s).unflatten(-1, (2, 8)).transpose(1, 2) for layer, s in self._pairs(x, source)
        ]
        mixed = functional.scaled_dot_product_attention(*heads)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _pairs(self, x: Tensor, source: Tensor) -> list[tuple[nn.Linear, Tensor]]:
        return [(self.q, x), (self.k, source), (self.v, source)]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))


class Net(nn.Module):
    """Layers made by `make`, run by `step(layer, x)`, with a head."""

    def __init__(
        self,
        make: Callable[[], dict[str, nn.Module]],
        step: Callable[[nn.ModuleDict, Tensor], Tensor],
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict(make()) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 4)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.step(layer, x)
        return self.head(x)


class Images(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.step(layer, x)
        return self.head(x.mean((2, 3)))


def graph_of_net(net: nn.Module, x: Tensor = X) -> Graph:
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    graph = capture_module(net.eval(), (x,), dynamic=False)
    canonicalize(graph)
    return graph


def attention_and_mlp() -> dict[str, nn.Module]:
    norms = {"norm1": nn.LayerNorm(WIDTH), "norm2": nn.LayerNorm(WIDTH)}
    return {"attention": Attention(), "mlp": mlp(), **norms}


@functools.cache
def _stepped(step, depth: int) -> tuple[nn.Module, Graph]:
    net = Net(attention_and_mlp, step, depth)
    return net, graph_of_net(net)


def stepped(step, depth: int) -> tuple[nn.Module, Graph]:
    """A network of `depth` layers and its graph, both to be edited."""
    net, graph = _stepped(step, depth)
    return copy.deepcopy(net), graph.copy()


def pre_norm(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    x = x + layer["attention"](layer["norm1"](x))
    return x + layer["mlp"](layer["norm2"](x))


def post_norm(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    x = layer["norm1"](x + layer["attention"](x))
    return layer["norm2"](layer["mlp"](x) + x)


def arms_first(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    normed = layer["norm1"](x)
    return layer["attention"](normed) + layer["mlp"](normed) + x


def arms_one_by_one(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    normed = layer["norm1"](x)
    return x + layer["attention"](normed) + layer["mlp"](normed)


def arms_with_own_norms(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    return x + (layer["mlp"](layer["norm2"](x)) + layer["attention"](layer["norm1"](x)))


def scaled_branch(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    x = x + 0.5 * layer["attention"](layer["norm1"](x))
    return x + 0.5 * layer["mlp"](layer["norm2"](x))


def scaled_shortcut(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    x = layer["norm1"](1.5 * x + layer["attention"](x))
    return layer["norm2"](1.5 * x + layer["mlp"](x))


def sandwich(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    x = x + layer["norm1"](layer["attention"](layer["norm1"](x)))
    return x + layer["norm2"](layer["mlp"](layer["norm2"](x)))


STEPS = (
    pre_norm,
    post_norm,
    arms_first,
    arms_one_by_one,
    arms_with_own_norms,
    scaled_branch,
    scaled_shortcut,
    sandwich,
)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_a_block_is_attention_and_mlp(step, depth: int) -> None:
    _, graph = stepped(step, depth)
    assert [block.kinds for block in graph.blocks] == [("attention", "mlp")] * depth
    assert [block.name for block in graph.blocks] == [f"layers.{i}" for i in range(depth)]
    assert all(sublayer.droppable for sublayer in graph.stream.sublayers)


WITHOUT_ATTENTION = {
    pre_norm: lambda layer, x: x + layer["mlp"](layer["norm2"](x)),
    post_norm: lambda layer, x: layer["norm2"](x + layer["mlp"](x)),
    arms_first: lambda layer, x: x + layer["mlp"](layer["norm1"](x)),
    arms_one_by_one: lambda layer, x: x + layer["mlp"](layer["norm1"](x)),
    arms_with_own_norms: lambda layer, x: x + layer["mlp"](layer["norm2"](x)),
    scaled_branch: lambda layer, x: x + 0.5 * layer["mlp"](layer["norm2"](x)),
    # The scalar belongs to the shortcut and stays; the norm after the add goes.
    scaled_shortcut: lambda layer, x: layer["norm2"](1.5 * (1.5 * x) + layer["mlp"](1.5 * x)),
    sandwich: lambda layer, x: x + layer["norm2"](layer["mlp"](layer["norm2"](x))),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_bypassed_attention_is_gone(step) -> None:
    net, graph = stepped(step, 2)
    bypass(graph, [s for s in graph.stream.sublayers if s.kind == "attention"])
    graph.finish()
    assert graph.find(aten.scaled_dot_product_attention.default) == []
    net.step = WITHOUT_ATTENTION[step]
    with torch.no_grad():
        expected = net(X)
    # The graph sums the terms in another order at most: rounding of float32.
    torch.testing.assert_close(graph(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [s for s in STEPS if s is not scaled_shortcut])
def test_all_blocks_bypassed_leave_the_head(step) -> None:
    net, graph = stepped(step, 2)
    bypass(graph, graph.stream.sublayers)
    graph.finish()
    with torch.no_grad():
        assert torch.equal(graph(X), net.head(X))


# ---- what is not a sublayer ---------------------------------------------------------------


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, as LoRA leaves it."""

    def __init__(self, width: int = WIDTH, out: int = WIDTH) -> None:
        super().__init__()
        self.full, self.a, self.b = nn.Linear(width, out), nn.Linear(width, 2), nn.Linear(2, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.full(x) + self.b(self.a(x))


class AdaptedAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Adapter() for _ in range(4))


def test_low_rank_additions_are_no_arms() -> None:
    def make() -> dict[str, nn.Module]:
        adapted = nn.Sequential(Adapter(WIDTH, 32), nn.ReLU(), Adapter(32, WIDTH))
        return {**attention_and_mlp(), "attention": AdaptedAttention(), "mlp": adapted}

    graph = graph_of_net(Net(make, pre_norm, 2))
    assert [block.kinds for block in graph.blocks] == [("attention", "mlp")] * 2


def test_a_shared_expert_is_part_of_its_mixture() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.shared = nn.Linear(WIDTH, 4), mlp()
            self.experts = nn.ModuleList(mlp() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            scores, places = self.router(x).softmax(-1).topk(2)
            gates = torch.zeros_like(self.router(x)).scatter(-1, places, scores)
            routed = sum(gates[..., i : i + 1] * e(x) for i, e in enumerate(self.experts))
            return routed + self.shared(x)

    graph = graph_of_net(Net(lambda: {**attention_and_mlp(), "mlp": Mixture()}, pre_norm, 2))
    assert [block.kinds for block in graph.blocks] == [("attention", "moe")] * 2


def test_sums_without_a_contraction_are_no_branches() -> None:
    graph = graph_of_net(Net(lambda: {"l": nn.Linear(WIDTH, WIDTH)}, lambda layer, x: x + x.tanh()))
    assert graph.blocks == ()
    assert graph.stream.remarks == ("no residual adds were found",)


def test_positions_are_no_branch() -> None:
    class Embedded(Net):
        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1).expand_as(x)
            return super().forward(x + self.layers[0]["mlp"](positions))

    graph = graph_of_net(Embedded(attention_and_mlp, pre_norm, 2))
    assert [block.kinds for block in graph.blocks] == [("attention", "mlp")] * 2


def test_a_convolution_before_attention_is_a_positional_embedding() -> None:
    class Convolved(Net):
        def __init__(self) -> None:
            super().__init__(attention_and_mlp, pre_norm, 2)
            self.position = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.position(x.transpose(1, 2)).transpose(1, 2).relu())

    graph = graph_of_net(Convolved())
    assert [block.kinds for block in graph.blocks] == [("attention", "mlp")] * 2
    assert "positional embedding" in graph.stream.remarks[0]


def test_the_trunk_under_a_long_skip_keeps_its_blocks() -> None:
    class Skipped(Net):
        def forward(self, x: Tensor) -> Tensor:
            inner = x
            for layer in self.layers:
                inner = self.step(layer, inner)
            return self.head(x + inner)

    graph = graph_of_net(Skipped(attention_and_mlp, pre_norm, 3))
    assert [block.kinds for block in graph.blocks] == [("attention", "mlp")] * 3


# ---- kinds and blocks ---------------------------------------------------------------------


def test_attention_in_pieces_is_attention() -> None:
    class Pieces(Attention):
        def forward(self, x: Tensor) -> Tensor:
            scores = self.q(x) @ self.k(x).transpose(1, 2) / 4
            return self.o((scores + scores.abs().cumsum(-1)).softmax(-1) @ self.v(x))

    graph = graph_of_net(Net(lambda: {**attention_and_mlp(), "attention": Pieces()}, pre_norm, 2))
    assert [block.kinds for block in graph.blocks] == [("attention", "mlp")] * 2


def test_a_decoder_attends_to_its_encoder() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Net(attention_and_mlp, pre_norm, 2), nn.ModuleList()
            for _ in range(2):
                layer = {**attention_and_mlp(), "cross": Attention()}
                self.decoder.append(nn.ModuleDict(layer))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for layer in self.encoder.layers:
                x = pre_norm(layer, x)
            for layer in self.decoder:
                y = y + layer["attention"](y)
                y = y + layer["cross"](y, x)
                y = y + layer["mlp"](y)
            return y

    graph = capture_module(Pair().eval(), (X, X[:, :3]), dynamic=False)
    canonicalize(graph)
    decoder = ("attention", "cross-attention", "mlp")
    assert [b.kinds for b in graph.blocks] == [("attention", "mlp")] * 2 + [decoder] * 2
    assert [b.stack for b in graph.blocks] == ["encoder"] * 2 + ["decoder"] * 2
    encoded = graph.blocks[1].exit
    assert all(encoded in block.inputs for block in graph.blocks[2:])
    assert graph.stream.stack(graph.blocks[0]) == graph.blocks[:2]


def test_pointwise_convolutions_are_an_mlp() -> None:
    def make() -> dict[str, nn.Module]:
        return {"a": nn.Conv2d(WIDTH, 32, 1), "b": nn.Conv2d(32, WIDTH, 1)}

    graph = graph_of_net(Images(make, lambda m, x: x + m["b"](m["a"](x).relu())), IMAGE)
    assert [block.kinds for block in graph.blocks] == [("mlp",)] * 3


def conv_block(stride: int) -> dict[str, nn.Module]:
    first = nn.Conv2d(WIDTH, WIDTH, 3, stride, padding=1)
    second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
    return {"a": first, "b": second, "p": nn.Conv2d(WIDTH, WIDTH, 1, stride)}


def identity_shortcut(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    return (x + layer["b"](layer["a"](x).relu())).relu()


def projected_shortcut(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    return (layer["p"](x) + layer["b"](layer["a"](x).relu())).relu()


def test_a_residual_block_of_convolutions_ends_with_its_activation() -> None:
    graph = graph_of_net(Images(lambda: conv_block(1), identity_shortcut), IMAGE)
    assert [block.kinds for block in graph.blocks] == [("conv",)] * 3
    assert all(block.droppable for block in graph.blocks)
    assert [block.exit.target for block in graph.blocks] == [aten.relu.default] * 3


def test_a_projected_shortcut_is_a_block_that_stays() -> None:
    graph = graph_of_net(Images(lambda: conv_block(2), projected_shortcut), IMAGE)
    assert [block.kinds for block in graph.blocks] == [("conv",)] * 3
    assert not any(block.droppable for block in graph.blocks)
    with pytest.raises(GraphError, match=r"layers.1.conv can't be dropped: the shortcut"):
        bypass(graph, graph.blocks[1].sublayers)


def test_sublayers_of_another_graph_are_refused() -> None:
    graph = graph_of_net(Net(attention_and_mlp, pre_norm, 1))
    twin = graph.copy()
    with pytest.raises(GraphError, match="are not sublayers of this graph as it is now"):
        bypass(twin, graph.stream.sublayers)


@pytest.mark.parametrize(
    ("kinds", "sizes"),
    [
        (["attention", "mlp"] * 2, [2, 2]),
        (["attention", "cross-attention", "mlp"] * 2, [3, 3]),
        (["ssm"] * 3, [1, 1, 1]),
        (["ssm", "mlp", "attention", "moe"], [2, 2]),
        (["attention", "attention", "mlp"], [1, 2]),
        (["mlp", "attention", "mlp"], [1, 2]),
        (["attention", "mlp", "mlp"], [2, 1]),
        (["mlp", "attention", "conv", "mlp"] * 2, [4, 4]),
        ([], []),
    ],
)
def test_blocks_begin_where_positions_are_mixed_again(kinds, sizes) -> None:
    places = list(range(len(kinds)))
    blocks = group(places, kinds)
    assert [len(block) for block in blocks] == sizes
    assert [place for block in blocks for place in block] == places


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["model.layers.0", "model.layers.2"], ["0", "2"]),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0"], ["0.0", "0.1", "1.0"]),
        (["encoder.block.0", "decoder.block.0"], ["encoder.0", "decoder.0"]),
        (["a", "b"], ["0", "1"]),
        ([], []),
    ],
)
def test_labels_are_the_numbers_in_the_names(names, labels) -> None:
    assert block_labels(names) == labels


# ---- reach --------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(dags())
def test_reach_is_the_transitive_closure(sources) -> None:
    graph = graph_of({"x": torch.zeros(2)})
    nodes = [graph.inputs[0]]
    for row in sources:
        operands = [nodes[place] for place in row] or [nodes[0]]
        nodes.append(graph.call(aten.cat.default, operands, before=graph.output))
    reach = Reach(graph.nodes)
    for node in nodes:
        expected, front = set(), list(node.all_input_nodes)
        while front:
            above = front.pop()
            expected.add(above)
            front += above.all_input_nodes
        assert set(reach.members(reach.ancestors(node))) == expected
        for other in nodes:
            assert reach.depends(node, other) == (other in expected)
            assert (node in reach.members(reach.descendants(other))) == (other in expected)


@settings(max_examples=30, deadline=None)
@given(programs(longest=25))
def test_every_random_graph_has_a_stream(program) -> None:
    graph = built(program)
    graph.finish()
    stream = graph.stream
    owned = [node for sublayer in stream.sublayers for node in sublayer.nodes]
    assert len(owned) == len(set(owned))
    for sublayer in stream.sublayers:
        assert sublayer.add.args[:2].count(sublayer.branch) >= 1
        assert sublayer.shortcut in sublayer.add.args


def test_shapes_are_no_data() -> None:
    graph = graph_of({"x": torch.zeros(2, 3)})
    x = graph.inputs[0]
    size = graph.call(aten.sym_size.int, x, 0, before=graph.output)
    full = graph.call(aten.full.default, [size, 3], 1.0, before=graph.output)
    reach = Reach(graph.nodes)
    assert not reach.depends(full, x)
