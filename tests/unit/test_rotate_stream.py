"""A stream in a turned basis: the same function in float64, and no channel that stands out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import PassError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.verify import verify
from lamella.passes.base import Analyses
from lamella.passes.transforms.fold_norms import FoldNorms
from lamella.passes.transforms.rotate_stream import RotateStream, drawn
from lamella.rewrite.canonicalize import canonicalize
from tests.unit.widened import widen
from tests.zoo.families import FAMILIES


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("width", [1, 7, 32, 96])
def test_what_is_drawn_is_orthogonal(kind: str, width: int) -> None:
    found = drawn(width, kind, torch.Generator().manual_seed(0))
    eye = torch.eye(width, dtype=torch.float64)
    # Products of float64.
    torch.testing.assert_close(found @ found.T, eye, rtol=0.0, atol=1e-12)
    if kind == "hadamard" and width == 32:
        # All entries alike: no channel of the old basis stays in one of the new.
        torch.testing.assert_close(
            found.abs(), torch.full_like(found, 32**-0.5), rtol=1e-12, atol=0.0
        )


def _rotate(graph: Graph, *, strict: bool = False) -> Sequence[str]:
    analyses = Analyses(graph, strict=strict)
    RotateStream().run(graph, analyses)
    graph.finish()
    verify(graph)
    return analyses.take_remarks()


@pytest.mark.parametrize(("family", "kept"), [("qwen3", 0), ("gemma2", 7)])
def test_the_function_stays_in_float64(family: str, kept: int) -> None:
    """Gemma has norms behind its branches, whose scale no layer can take, and a tied head."""
    inputs = FAMILIES[family].inputs()
    graph = capture_module(FAMILIES[family].build(), inputs)
    canonicalize(graph)
    widen(graph)
    want = graph(**inputs)["logits"]
    FoldNorms().run(graph, Analyses(graph))
    told = _rotate(graph)
    assert any("turned 1 streams" in text for text in told)
    assert any(f"{kept} norms kept" in text for text in told) == bool(kept)
    # A dozen layers of products of float64.
    torch.testing.assert_close(graph(**inputs)["logits"], want, rtol=1e-10, atol=1e-10)


class _Tied(nn.Module):
    """A stream with an outlier channel, a bias, positions, and a head tied to the table."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.places = nn.Parameter(torch.randn(16, width) * 0.1)
        self.norm, self.last = nn.RMSNorm(width), nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.places[: tokens.shape[1]]
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return nn.functional.linear(self.last(x), self.table.weight)


def _tied() -> tuple[_Tied, Tensor, Graph]:
    torch.manual_seed(0)
    model = _Tied().eval()
    with torch.no_grad():
        model.table.weight[:, 5] *= 40.0
        model.last.weight.uniform_(0.5, 2.0)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    graph = capture_module(model, (tokens,))
    canonicalize(graph)
    return model, tokens, graph


def test_a_tied_head_keeps_the_scale_of_its_norm_as_a_layer() -> None:
    model, tokens, graph = _tied()
    want = model(tokens).detach()
    told = " ".join(_rotate(graph))
    assert "2 norms kept their scale as a dense layer" in told
    assert len(graph.find(aten.linear.default)) == 5
    # Two layers of float32, logits of up to a hundred.
    torch.testing.assert_close(graph(tokens), want, rtol=1e-4, atol=1e-3)


def test_outliers_of_a_channel_are_spread() -> None:
    _, _, graph = _tied()
    FoldNorms().run(graph, Analyses(graph))

    def spike(weight: Tensor) -> float:
        return float((weight.abs().amax(1) / weight.square().mean(1).sqrt()).median())

    before = spike(graph.weight("table.weight"))
    _rotate(graph)
    # The largest entry was that of one channel of 64; now it is that of a normal row.
    assert before > 7.5
    assert spike(graph.weight("table.weight")) < 3.5


class _LayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.RMSNorm(8), nn.LayerNorm(8)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(self.norm(x))
        return self.layer(self.other(x))


def test_a_stream_that_cannot_turn_is_told() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    graph = capture_module(_LayerNorm(), (x,))
    canonicalize(graph)
    want = graph(x)
    (told,) = _rotate(graph)
    assert "a stream of width 8 stays" in told
    assert torch.equal(graph(x), want)
    with pytest.raises(PassError, match="strict"):
        _rotate(graph, strict=True)
    with pytest.raises(ValueError, match="kind"):
        RotateStream("random")
