"""Dropped blocks: the function of the model without them, and nothing of them left."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.data import Samples
from lamella.errors import PassError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.passes.base import Analyses
from lamella.passes.transforms.drop_blocks import DropBlocks
from lamella.passes.transforms.selecting import evenly
from lamella.rewrite.canonicalize import canonicalize

# float32 sums in another order; outputs are of order one.
_CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

_LISTS = {
    "llama": "model.layers",
    "gemma2": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "mixtral": "model.layers",
    "bert": "encoder.layer",
    "vit": "vit.layers",
    "mamba": "backbone.layers",
    "modernbert": "model.layers",
}
"""Where the blocks of a family are in its module."""


def _run(graph: Graph, a_pass: DropBlocks, samples: Samples | None = None) -> Analyses:
    analyses = Analyses(graph, samples)
    a_pass.run(graph, analyses)
    graph.finish()
    return analyses


def _without(model: nn.Module, path: str, gone: set[int]) -> nn.Module:
    """`model` with blocks taken out of its list of layers."""
    owner, _, leaf = path.rpartition(".")
    parent = model.get_submodule(owner)
    layers = getattr(parent, leaf)
    setattr(parent, leaf, nn.ModuleList(x for i, x in enumerate(layers) if i not in gone))
    config: Any = model.config
    for name in ("num_hidden_layers", "n_layer"):
        if hasattr(config, name):
            setattr(config, name, len(layers) - len(gone))
    return model


@pytest.mark.parametrize(
    ("family", "gone"),
    # Layers of these two that stay would change between local and global attention.
    [(family, {1}) for family in _LISTS]
    + [(family, {0, 2}) for family in _LISTS if family not in ("gemma2", "modernbert")],
)
def test_equals_the_model_with_fewer_layers(
    family: str,
    gone: set[int],
    captured: Callable[[str], Graph],
    model: Callable[[str], nn.Module],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph, inputs = captured(family), sample_inputs(family)
    smaller = _without(model(family), _LISTS[family], gone)
    names = [graph.blocks[index].name for index in sorted(gone)]
    _run(graph, DropBlocks(blocks=tuple(gone)))
    with torch.no_grad():
        want = smaller(**inputs)
    torch.testing.assert_close(graph(**inputs)[0], want[0], **_CLOSE)
    assert len(graph.blocks) == 3 - len(gone)
    assert graph.origin.dropped == tuple(names)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "vit", "t5", "whisper"])
def test_operators_and_bytes_go(family: str, captured: Callable[[str], Graph]) -> None:
    graph = captured(family)
    blocks = graph.blocks
    operators = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
    inside = Counter(str(node.target) for node in blocks[1].nodes if node.op == "call_function")
    weights = {n: n.meta["val"] for n in blocks[1].nodes if n.op == "get_attr"}
    freed = sum(value.numel() * value.element_size() for value in weights.values())
    before = graph.weight_bytes()
    _run(graph, DropBlocks(blocks=(1,)))
    after = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
    assert before - graph.weight_bytes() >= freed > 0
    for target, count in inside.items():
        assert operators[target] - after[target] >= count
    assert "scaled_dot_product_attention" in " ".join(operators - after)
    left = dict(graph.module.named_buffers())
    assert not any(str(node.target) in left for node in weights)


def test_the_users_model_and_a_copy_stay(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    graph, inputs = captured("llama"), sample_inputs("llama")
    copy, want = graph.copy(), graph(**inputs)[0]
    _run(graph, DropBlocks(blocks=(1,)))
    assert torch.equal(copy(**inputs)[0], want)
    assert copy.origin.dropped == ()


def test_hidden_states_are_those_of_the_block_before(
    model: Callable[[str], nn.Module], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    bert, inputs = model("bert"), sample_inputs("bert")
    bert.config.output_hidden_states = True
    graph = capture_module(bert, inputs)
    canonicalize(graph)
    _run(graph, DropBlocks(blocks=(1,)))
    got = graph(**inputs).hidden_states
    assert len(got) == 4
    assert torch.equal(got[1], got[2])


class _Attending(nn.Module):
    """A pre-norm block of attention and MLP that also returns its attention map."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(x)
        scores = self.query(normed) @ self.key(normed).mT / math.sqrt(8)
        weights = scores.softmax(-1)
        x = x + weights @ self.value(normed)
        return x + self.down(torch.relu(self.up(self.norm_2(x)))), weights


class _Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Attending() for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        maps: tuple[Tensor, ...] = ()
        for layer in self.layers:
            x, weights = layer(x)
            maps = (*maps, weights)
        return {"logits": self.head(x), "attentions": maps}


def test_attention_maps_leave_the_output() -> None:
    torch.manual_seed(0)
    network = _Maps().eval()
    x = torch.randn(2, 5, 8)
    graph = capture_module(network, (x,))
    canonicalize(graph)
    analyses = _run(graph, DropBlocks(blocks=(1,)))
    assert re.search("attentions.1", " ".join(analyses.take_remarks()))
    network.layers = nn.ModuleList([network.layers[0], network.layers[2]])
    want, got = network(x), graph(x)
    assert graph.signature.outputs == ("logits", "attentions.0", "attentions.2")
    assert len(got["attentions"]) == 2
    torch.testing.assert_close(got["logits"], want["logits"], **_CLOSE)
    torch.testing.assert_close(got["attentions"][1], want["attentions"][1], **_CLOSE)


def test_sizes_are_read_off_values_that_stay(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    graph = captured("llama")
    inner = next(n for n in graph.find(aten.silu.default) if n in graph.blocks[0].nodes)
    last = graph.outputs[0]
    length = graph.call(aten.sym_size.int, inner, 1, after=inner)
    factor = graph.call(aten.full.default, [1, length, 1], 2.0, before=graph.output)
    scaled = graph.call(aten.mul.Tensor, last, factor, before=graph.output)
    graph.set_outputs([scaled], graph.signature)
    _run(graph, DropBlocks(blocks=(0,)))
    assert not [n for n in graph.weight_nodes() if "layers.0." in str(n.target)]
    (size,) = [n for n in graph.find(aten.sym_size.int) if factor in n.users]
    assert size.args[0] in graph.inputs
    for length in (7, 4):
        assert graph(**sample_inputs("llama", 2, length))[0].shape[1] == length


def _texts(sample_inputs: Callable[..., dict[str, Tensor]], family: str) -> Samples:
    return Samples.of([sample_inputs(family, seed=seed) for seed in range(2)])


def test_by_score_takes_the_least_important(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    graph = captured("llama")
    # A block whose branches add nothing leaves the stream as it is: the least important.
    for block in graph.blocks[1:2]:
        for sublayer in block.sublayers:
            for node in sublayer.nodes:
                if node.op == "get_attr" and re.search("o_proj|down_proj", str(node.target)):
                    graph.set_weight(node, torch.zeros_like(graph.weight(node)))
    inputs = sample_inputs("llama")
    name, want = graph.blocks[1].name, graph(**inputs)[0]
    options: dict[str, Any] = {"keep_first": 0, "keep_last": 0}
    _run(graph, DropBlocks(count=1, by="similarity", **options), _texts(sample_inputs, "llama"))
    assert graph.origin.dropped == (name,)
    torch.testing.assert_close(graph(**inputs)[0], want, **_CLOSE)


def test_first_and_last_are_protected(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    name = graph.blocks[1].name
    _run(graph, DropBlocks(count=1, by="random"))
    assert graph.origin.dropped == (name,)
    with pytest.raises(PassError, match="2 blocks can't go: 1 may be dropped"):
        _run(captured("llama"), DropBlocks(count=2, by="random"))


def test_iterative_scores_again(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    graph, asked = captured("llama"), []
    analyses = Analyses(graph, _texts(sample_inputs, "llama"))
    original = analyses.get
    analyses.get = lambda analysis: (asked.append(graph.edits), original(analysis))[1]
    DropBlocks(count=2, iterative=True, keep_first=0, keep_last=0).run(graph, analyses)
    assert len(graph.blocks) == 1
    assert len(set(asked)) >= 2


@pytest.mark.parametrize(
    ("total", "count", "stay"),
    [
        (12, 4, (0, 2, 3, 5, 6, 8, 9, 11)),
        (5, 3, (0, 4)),
        (8, 1, (0, 1, 2, 4, 5, 6, 7)),
        (4, 0, (0, 1, 2, 3)),
    ],
)
def test_even_spacing(total: int, count: int, stay: tuple[int, ...]) -> None:
    class Fake:
        droppable = True

        def __init__(self, index: int) -> None:
            self.index, self.name = index, str(index)

    gone = evenly([Fake(i) for i in range(total)], count)
    left = sorted(set(range(total)) - {block.index for block in gone})
    assert tuple(left) == stay
    gaps = [b - a for a, b in itertools.pairwise(left)]
    assert max(gaps) - min(gaps) <= 1


def test_even_spacing_over_one_stack(captured: Callable[[str], Graph]) -> None:
    graph = captured("t5")
    with pytest.raises(PassError, match="say which with stack="):
        _run(graph, DropBlocks(count=1, spacing="even"))
    _run(graph, DropBlocks(count=1, spacing="even", stack="decoder"))
    assert [block.stack for block in graph.blocks] == ["encoder"] * 3 + ["decoder"] * 2


def test_relative_bias_of_the_first_block_survives(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    graph, inputs = captured("t5"), sample_inputs("t5")
    _run(graph, DropBlocks(blocks=(0,)))
    assert any("relative_attention_bias" in str(n.target) for n in graph.weight_nodes())
    assert torch.isfinite(graph(**inputs)[0]).all()


def test_blocks_that_change_the_shape_are_refused(captured: Callable[[str], Graph]) -> None:
    graph = captured("resnet")
    fixed = [block.index for block in graph.blocks if not block.droppable]
    before = graph.edits
    with pytest.raises(PassError, match="can't be dropped: the stream has another shape"):
        _run(graph, DropBlocks(blocks=tuple(fixed)))
    with pytest.raises(PassError, match="there is no block 9, 11: the graph has 4"):
        _run(graph, DropBlocks(blocks=(1, 9, 11)))
    assert graph.edits == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either how many"),
        ({"count": 1, "blocks": (1,)}, "either how many"),
        ({"count": 0}, "at least 1"),
        ({"count": 1, "keep_first": -1}, "must not be negative"),
        ({"count": 1, "spacing": "even", "iterative": True}, "no score"),
        ({"count": 1, "by": "similarty"}, "did you mean 'similarity'"),
        ({"blocks": ("7-3",)}, "runs backwards"),
        ({"blocks": ("a",)}, "expected an index"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DropBlocks(**options)
