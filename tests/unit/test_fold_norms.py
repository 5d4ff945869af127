"""Norm scales folded into linear layers: the same function, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import PassError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.passes.base import Analyses
from lamella.passes.transforms.fold_norms import FoldNorms
from lamella.rewrite.canonicalize import canonicalize


class _Net(nn.Module):
    """A norm read by two layers, one of them without bias, through a reshape."""

    def __init__(self, norm: nn.Module, *, width: int = 8, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.norm = norm
        self.gate = nn.Linear(width, 6)
        self.up = nn.Linear(width, 6, bias=False)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm(self.embedding(tokens))
        flat = normed.flatten(0, 1)
        product = torch.sigmoid(self.gate(normed)) * self.up(flat).unflatten(0, normed.shape[:2])
        return torch.cat([product, self.head(normed)], dim=-1)


def _norms() -> list[nn.Module]:
    generator = torch.Generator().manual_seed(0)
    layer, rms = nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6)
    for parameter in (*layer.parameters(), *rms.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator) + 0.5
    return [layer, rms]


def _graph(model: nn.Module) -> tuple[Graph, Tensor]:
    tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    graph = capture_module(model.double().eval(), (tokens,))
    canonicalize(graph)
    return graph, tokens


def _fold(graph: Graph, *, strict: bool = False) -> Sequence[str]:
    analyses = Analyses(graph, strict=strict)
    FoldNorms().run(graph, analyses)
    graph.finish()
    return analyses.take_remarks()


@pytest.mark.parametrize("norm", _norms(), ids=["layer_norm", "rms_norm"])
def test_folding_keeps_the_function(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model = _Net(norm)
    graph, tokens = _graph(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    want = model(tokens)
    assert _fold(graph) == ()
    # Products of float64 in another order.
    torch.testing.assert_close(graph(tokens), want, rtol=1e-12, atol=1e-12)
    (found,) = graph.find(aten.layer_norm.default, aten.rms_norm.default)
    assert graph.operand(found, "weight") is None
    assert not any("norm" in str(node.target) for node in graph.weight_nodes())
    # The weights of the user's model are as they were.
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_weight_is_what_the_formula_says() -> None:
    torch.manual_seed(0)
    model = _Net(_norms()[0])
    graph, _ = _graph(model)
    _fold(graph)
    scale, shift = model.norm.weight, model.norm.bias
    # Computed and compared in float64.
    exact = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(graph.weight("gate.weight"), model.gate.weight * scale, **exact)
    want = model.gate.bias + model.gate.weight @ shift
    torch.testing.assert_close(graph.weight("gate.bias"), want, **exact)
    (bias,) = [n for n in graph.weight_nodes() if str(n.target).startswith("up.bias")]
    torch.testing.assert_close(graph.weight(bias), model.up.weight @ shift, **exact)


def test_head_tied_to_the_embedding_is_left_alone() -> None:
    torch.manual_seed(0)
    graph, tokens = _graph(_Net(_norms()[1], tied=True))
    want = graph(tokens)
    (remark,) = _fold(graph)
    assert "shared with embedding" in remark
    assert torch.equal(graph(tokens), want)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return normed + self.layer(normed)


def test_another_reader_is_named_and_strict_refuses() -> None:
    torch.manual_seed(0)
    model = _Residual().double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    graph = capture_module(model, (x,))
    canonicalize(graph)
    want = graph(x)
    (remark,) = _fold(graph)
    assert "kept the scale of 1 norms" in remark
    assert "read by add" in remark
    assert torch.equal(graph(x), want)
    with pytest.raises(PassError, match="strict"):
        _fold(graph, strict=True)


def test_a_second_run_changes_nothing() -> None:
    torch.manual_seed(0)
    graph, _ = _graph(_Net(_norms()[0]))
    _fold(graph)
    edits = graph.edits
    _fold(graph)
    assert graph.edits == edits
