"""Weights: products become linear layers, constants are folded, and the model is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamella.ir.capture import capture_module, capture_program
from lamella.ir.weights import WeightSource
from lamella.rewrite.canonicalize import canonicalize, noncanonical
from tests.unit.written import canonical, graph_of, operators, random, run

aten = torch.ops.aten
X = random(2, 3, 4)
W, SQUARE, BIAS = random(4, 6, seed=1), random(4, 4, seed=3), random(6, seed=2)

PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "matmul": lambda x, w, b: x @ w + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.view(-1, 4), w).view(*x.shape[:-1], 6),
    "mm": lambda x, w, b: torch.mm(x.view(-1, 4), w).view(*x.shape[:-1], 6) + b,
    "vector": lambda x, w, b: x[0, 0] @ w + b,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_weight_is_a_linear_layer_with_the_weight_turned(name: str) -> None:
    weight = W.clone()
    graph, _ = canonical(PRODUCTS[name], X, w=weight, b=BIAS)
    (linear,) = graph.find(aten.linear.default)
    assert "matmul" not in operators(graph)
    assert graph.operand(linear, "bias").target == "b"
    # A view: the memory is that of the model, which is unchanged.
    assert graph.weight("w").data_ptr() == weight.data_ptr()
    assert graph.weight("w").shape == (6, 4)
    assert graph.origin.transposed == {"w"}
    torch.testing.assert_close(weight, W, rtol=0, atol=0)


def test_a_weight_that_is_turned_by_the_model_stays_as_it_is() -> None:
    graph, _ = canonical(lambda x, w: x @ w.t(), X, w=random(6, 4))
    assert operators(graph) == {"linear": 1}
    assert graph.origin.transposed == frozenset()


def test_a_weight_on_the_left_is_a_linear_layer_between_transposes() -> None:
    graph, _ = canonical(lambda x, w: w @ x.transpose(1, 2), X, w=random(6, 4))
    assert operators(graph) == {"linear": 1, "transpose": 1}


def test_readers_that_disagree_keep_the_weight() -> None:
    graph, _ = canonical(lambda x, w: x @ w + F.linear(x, w), X, w=SQUARE)
    assert operators(graph) == {"matmul": 1, "linear": 1, "add": 1}
    assert graph.origin.transposed == frozenset()


def test_all_readers_of_a_weight_are_turned_together() -> None:
    graph, _ = canonical(lambda x, w: (x @ w).sin() @ w, X, w=SQUARE)
    assert operators(graph) == {"linear": 2, "sin": 1}


class _Source(WeightSource):
    def __init__(self, **weights: Tensor) -> None:
        self.weights = weights

    def names(self) -> frozenset[str]:
        return frozenset(self.weights)

    def read(self, name: str) -> Tensor:
        return self.weights[name]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.weights[name][start:stop]


def test_weights_that_are_not_loaded_are_turned_when_they_are_read() -> None:
    graph = graph_of(lambda x, w: x @ w, X, w=W)
    graph.set_weight(graph.weight_node("w"), torch.empty(4, 6, dtype=W.dtype, device="meta"))
    graph.source = _Source(w=W)
    canonicalize(graph)
    assert operators(graph) == {"linear": 1}
    assert not graph.is_loaded("w")
    torch.testing.assert_close(run(graph, X), X @ W, rtol=1e-12, atol=1e-12)


def test_products_of_activations_are_matmuls() -> None:
    graph, _ = canonical(
        lambda x, y: torch.baddbmm(y @ y, x, y, beta=2, alpha=3), SQUARE[None], SQUARE[None]
    )
    assert operators(graph) == {"matmul": 2, "mul": 2, "add": 1}


FOLDED: dict[str, Callable[..., Tensor]] = {
    "minus exp": lambda x, w: x @ (-torch.exp(w)),
    "scaled then turned": lambda x, w: x @ (w.t() * 2).t(),
    "normalized": lambda x, w: x @ F.normalize(w, dim=0),
}


@pytest.mark.parametrize("name", FOLDED)
def test_expressions_of_weights_are_folded_into_one_new_weight(name: str) -> None:
    graph, report = canonical(FOLDED[name], X, w=W)
    assert operators(graph) == {"linear": 1}
    assert [str(node.target) for node in graph.weight_nodes()] == ["w_folded"]
    assert report.counts["fold_constants"] == 1


def test_folded_weights_have_names_that_do_not_clash() -> None:
    graph, _ = canonical(lambda x, w: x * w.exp() + x * w.sin(), X, w=random(4))
    assert sorted(str(n.target) for n in graph.weight_nodes()) == ["w_folded", "w_folded_2"]


def test_views_of_weights_are_not_folded() -> None:
    graph, _ = canonical(lambda x, w: x * w.unsqueeze(0), X, w=random(4))
    assert operators(graph) == {"unsqueeze": 1, "mul": 1}


def test_products_of_weights_are_not_folded() -> None:
    graph, _ = canonical(lambda x, w, v: x + F.linear(w, v), X, w=random(1, 4), v=SQUARE)
    assert operators(graph) == {"linear": 1, "add": 1}


def test_what_would_grow_too_much_is_not_folded() -> None:
    graph, report = canonical(
        lambda x, w: x.sum() + w.exp().repeat(1000, 1000).sin()[0], X, w=random(4)
    )
    assert operators(graph)["repeat"] == 1
    assert report.counts["fold_constants"] == 1
    assert graph.weight_bytes() == 4 * 8


def test_expressions_of_weights_that_are_not_loaded_stay() -> None:
    graph = graph_of(lambda x, w: x * w.exp(), X, w=random(4))
    graph.set_weight(graph.weight_node("w"), torch.empty(4, dtype=W.dtype, device="meta"))
    canonicalize(graph)
    assert operators(graph) == {"exp": 1, "mul": 1}


def test_weight_norm_is_folded_or_written_out() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3).double())
    graph = capture_module(model, {"input": X.transpose(1, 2)})
    canonicalize(graph)
    assert operators(graph) == {"conv1d": 1}
    got = graph(input=X.transpose(1, 2))
    torch.testing.assert_close(got, model(X.transpose(1, 2)), rtol=1e-12, atol=1e-12)
    with torch.device("meta"):
        bare = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    unloaded = capture_module(bare, {"input": torch.empty(2, 4, 3, device="meta")})
    canonicalize(unloaded)
    assert noncanonical(unloaded) == {}
    assert operators(unloaded)["linalg_vector_norm"] == 1


def test_constants_without_weights_are_folded() -> None:
    graph, _ = canonical(
        lambda x: x + torch.arange(4).double().exp().view(4), X, dynamic={"a": (0,)}
    )
    assert operators(graph) == {"add": 1}
    assert [str(node.target) for node in graph.weight_nodes()] == ["constant_folded"]


def test_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    canonicalize(capture_module(model, {"input": X}))
    assert list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


class Decomposed(nn.Module):
    """A bit of everything that core ATen spells in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding="same")
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.norm, self.group = nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.attention = nn.Linear(8, 24)
        self.out = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.silu(self.norm(self.conv(x))), 2)
        x = self.group(self.up(x)).flatten(2).transpose(1, 2)
        q, k, v = self.attention(x).view(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(x + mixed).log_softmax(-1)


# PyTorch's own decompositions use a deprecated class.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_decomposed_programs_come_back_whole() -> None:
    torch.manual_seed(0)
    model = Decomposed().double().eval()
    image = random(2, 3, 8, 8)
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(model, (), {"x": image}, dynamic_shapes=shapes, strict=False)
    graph = capture_program(program.run_decompositions())
    canonicalize(graph)
    assert noncanonical(graph) == {}
    counts = operators(graph)
    whole = ("conv2d", "batch_norm", "silu", "max_pool2d", "conv_transpose2d", "group_norm")
    for op in (*whole, "scaled_dot_product_attention", "layer_norm", "gelu", "log_softmax"):
        assert counts[op] == 1, op
    assert counts["linear"] == 2
    torch.testing.assert_close(graph(x=image), model(image), rtol=1e-10, atol=1e-10)


def test_safe_softmax_of_the_onnx_exporter_is_attention() -> None:
    def exported(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = math.sqrt(1 / math.sqrt(8))
        weights = torch.softmax((q * scale) @ (k.permute(0, 1, 3, 2) * scale), -1)
        return torch.where(torch.isnan(weights), 0.0, weights) @ v

    inputs = [random(2, 4, 5, 8, seed=seed) for seed in range(3)]
    graph, _ = canonical(exported, *inputs)
    assert operators(graph) == {"scaled_dot_product_attention": 1}


def test_experts_are_grouped_linears() -> None:
    reason = "this transformers has no grouped product of experts"
    pytest.importorskip("transformers.integrations.moe", reason=reason)
    product = torch.ops.transformers.grouped_mm_fallback

    def experts(x: Tensor, offsets: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return product(product(x, w.transpose(-2, -1), offsets), v, offsets)

    x, offsets = random(6, 4), torch.tensor([1, 4, 6], dtype=torch.int32)
    w, v = random(3, 5, 4, seed=1), random(3, 5, 2, seed=2)
    graph, _ = canonical(experts, x, offsets, dynamic={"a": (0,)}, w=w, v=v)
    assert operators(graph) == {"grouped_linear": 2}
    assert graph.origin.transposed == {"v"}
    assert graph.weight("v").shape == (3, 2, 5)
