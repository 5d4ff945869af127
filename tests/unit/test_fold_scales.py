"""Factors folded into weights: the same function in float64, and weights that round better."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lamella
from lamella.data import Samples
from lamella.errors import SamplesError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.torch_private import tree_leaves
from lamella.ir.verify import verify
from lamella.passes.base import Analyses
from lamella.passes.scale_places import find_places
from lamella.passes.transforms.fold_scales import FoldScales
from lamella.rewrite.canonicalize import canonicalize
from tests.unit.widened import widen
from tests.zoo.families import FAMILIES

# Family -> how many norms and how many linear layers take factors, from how the models are built.
PLACES = {
    # Two norms in each of three blocks and the one before the head; values and up of each block.
    "llama": (7, 6),
    "qwen2": (7, 6),
    # The head is tied to the table, so the last norm has none; values are a third of one layer.
    "gpt2": (6, 3),
    # The stream reads every norm.
    "bert": (0, 3),
    # The last norm is read where the class token is chosen; gelu stands between the layers.
    "vit": (7, 3),
    # relu lets factors through; the head is tied.
    "opt": (6, 6),
}


def _graph(model: nn.Module, inputs: dict[str, Tensor] | tuple[Tensor, ...]) -> Graph:
    graph = capture_module(model, inputs)
    canonicalize(graph)
    return graph


def _fold(graph: Graph, fold: FoldScales, samples: Samples) -> Sequence[str]:
    analyses = Analyses(graph, samples)
    fold.run(graph, analyses)
    graph.finish()
    verify(graph)
    return analyses.take_remarks()


@pytest.mark.parametrize("name", PLACES)
def test_the_function_stays_in_float64(name: str) -> None:
    family = FAMILIES[name]
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in family.inputs().items()}
    graph = _graph(family.build(), family.inputs())
    widen(graph)
    places, _ = find_places(graph)
    norms = sum(place.is_norm for place in places)
    assert (norms, len(places) - norms) == PLACES[name]
    want = [value.clone() for value in tree_leaves(graph(**inputs)) if isinstance(value, Tensor)]
    for fold in (FoldScales(), FoldScales("awq", bits=4, grid=2)):
        edited = graph.copy()
        fold.run(edited, Analyses(edited, Samples.of([inputs])))
        edited.finish()
        changed = [
            str(node.target)
            for node in edited.weight_nodes()
            if not torch.equal(edited.weight(node), graph.weight(str(node.target)))
        ]
        # On two tokens AWQ may find that nothing is to be gained in a place.
        assert len(changed) >= (len(places) if fold.strategy == "smoothquant" else 2)
        got = [value for value in tree_leaves(edited(**inputs)) if isinstance(value, Tensor)]
        for one, other in zip(got, want, strict=True):
            # Factors of up to 1e4 in either direction and a dozen layers of float64.
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


class _Pair(nn.Module):
    """A norm, two layers that read it, and their product in front of a third."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 96)
        self.up = nn.Linear(width, 96)
        self.down = nn.Linear(96, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(torch.sigmoid(self.gate(y)) * self.up(y))


def _planted() -> tuple[_Pair, Tensor]:
    """Every sixteenth channel behind the norm is thirty times as large."""
    torch.manual_seed(0)
    model = _Pair().eval()
    with torch.no_grad():
        model.norm.weight[::16] *= 30.0
        # The layers have learned to expect that.
        for layer in (model.gate, model.up):
            layer.weight[:, ::16] /= 30.0
    return model, torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(1))


def test_smoothquant_is_the_formula() -> None:
    model, x = _planted()
    graph = _graph(model, (x,))
    _fold(graph, FoldScales("smoothquant", alpha=0.75, layers=False), Samples.of([{"x": x}]))
    with torch.no_grad():
        inputs = model.norm(x).abs().flatten(0, 1).amax(0)
    weights = torch.stack([model.gate.weight, model.up.weight]).detach().abs().amax((0, 1))
    scales = inputs**0.75 / weights**0.25
    # Products of float64, stored as float32.
    exact = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(graph.weight("gate.weight"), model.gate.weight * scales, **exact)
    torch.testing.assert_close(graph.weight("up.weight"), model.up.weight * scales, **exact)
    torch.testing.assert_close(graph.weight("norm.weight"), model.norm.weight / scales, **exact)
    torch.testing.assert_close(graph.weight("norm.bias"), model.norm.bias / scales, **exact)
    assert torch.equal(graph.weight("down.weight"), model.down.weight)


def _rounded(weight: Tensor, bits: int, block: int = 32) -> Tensor:
    """Round to nearest in blocks, symmetric, written apart from the library."""
    blocks = weight.unflatten(-1, (-1, block))
    step = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((blocks / step).round() * step).flatten(-2)


@pytest.mark.parametrize("bits", [3, 4])
def test_awq_lowers_the_error_of_rounding_with_planted_outliers(bits: int) -> None:
    model, x = _planted()
    graph = _graph(model, (x,))
    want = model(x).detach()

    def loss(edited: Graph) -> float:
        for node in edited.weight_nodes():
            if edited.weight(node).ndim == 2:
                edited.set_weight(node, _rounded(edited.weight(node), bits))
        return float((edited(x).detach() - want).square().mean())

    plain = loss(graph.copy())
    remarks = _fold(graph, FoldScales("awq", bits=4), Samples.of([{"x": x}]))
    assert any("squared error of the outputs at 4 bits: 0." in text for text in remarks)
    # With columns that count thirty times as much rounded alike, half of it goes.
    assert loss(graph) < 0.6 * plain


def test_smoothquant_makes_one_scale_for_all_inputs_safer() -> None:
    model, x = _planted()
    graph = _graph(model, (x,))

    def error(edited: Graph) -> float:
        """Relative squared error of what the layers read, with 8 bits and one scale for all."""
        (norm,) = edited.find(aten.layer_norm.default)
        weights = [edited.operand(norm, name) for name in ("weight", "bias")]
        scale, shift = (edited.weight(one) for one in weights)
        read = nn.functional.layer_norm(x, (64,), scale, shift)
        step = read.abs().max() / 127
        weight = edited.weight("up.weight")
        change = ((read / step).round() * step - read) @ weight.T
        return float(change.square().mean() / (read @ weight.T).square().mean())

    plain = error(graph)
    _fold(graph, FoldScales("smoothquant"), Samples.of([{"x": x}]))
    assert error(graph) < 0.1 * plain


class _Tied(nn.Module):
    """A norm whose readers are a layer and the stream, and one that is read by a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.layer = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.table(tokens))
        x = x + self.layer(x)
        return nn.functional.linear(self.second(x), self.table.weight)


def test_places_that_are_left_alone_are_told_with_the_reason() -> None:
    torch.manual_seed(0)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    graph = _graph(_Tied(), (tokens,))
    want = graph(tokens)
    told = " ".join(_fold(graph, FoldScales(), Samples.of([{"tokens": tokens}])))
    assert "read by aten.add.Tensor" in told
    assert "weight table.weight is shared with embedding" in told
    assert "no norm and no linear layer can take factors" in told
    assert torch.equal(graph(tokens), want)


def test_a_channel_without_signal_keeps_its_factor() -> None:
    model, x = _planted()
    with torch.no_grad():
        model.norm.weight[3] = 0.0
        model.norm.bias[3] = 0.0
        model.up.weight[:, 5] = model.gate.weight[:, 5] = 0.0
    graph = _graph(model, (x,))
    _fold(graph, FoldScales(layers=False), Samples.of([{"x": x}]))
    assert torch.equal(graph.weight("up.weight")[:, 3], model.up.weight[:, 3])
    assert torch.equal(graph.weight("norm.weight")[5], model.norm.weight[5])
    # Factors near 1 in float32.
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_norm_without_scale_gets_one() -> None:
    torch.manual_seed(0)
    model = _Pair().double()
    model.norm = nn.LayerNorm(64, elementwise_affine=False)
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    graph = _graph(model, (x,))
    _fold(graph, FoldScales(), Samples.of([{"x": x}]))
    assert "layer_norm.scale" in {str(node.target) for node in graph.weight_nodes()}
    torch.testing.assert_close(graph(x), model(x), rtol=1e-10, atol=1e-10)


def test_it_needs_samples_and_sensible_options() -> None:
    model, x = _planted()
    graph = _graph(model, (x,))
    for strategy in ("smoothquant", "awq"):
        with pytest.raises(SamplesError, match="samples"):
            FoldScales(strategy).run(graph, Analyses(graph))
    for options in ({"strategy": "sq"}, {"alpha": 1.5}, {"grid": 0}, {"bits": 33}):
        with pytest.raises(ValueError, match=next(iter(options))):
            FoldScales(**options)


def test_grouped_heads_share_a_factor() -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=20, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    graph = _graph(hf.LlamaForCausalLM(config).eval(), {"input_ids": tokens})
    places, _ = find_places(graph)
    (values,) = [p for p in places if not p.is_norm and len(p.free) == 16]
    # Two queries' heads of 8 read each head of values: columns 0-7 and 8-15 read channels 0-7.
    want = torch.cat([torch.arange(8)] * 2 + [torch.arange(8, 16)] * 2)
    assert torch.equal(values.readers[0].channels, want)


def test_a_model_with_moved_factors_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=20, use_cache=False,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).eval().save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    graph = lamella.capture(tmp_path / "model", inputs)
    want = graph(**inputs)["logits"]
    # The manager checks on other inputs that the outputs are the same.
    lamella.transform(graph, ["fold-scales strategy=awq grid=3"], samples=[inputs])
    lamella.save_checkpoint(graph, tmp_path / "out")
    with torch.no_grad():
        got = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out")(**inputs).logits
    # Two blocks of float32 in another order.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["smoothquant", "awq"])
def test_inputs_that_overflow_name_the_layers(strategy: str) -> None:
    model, x = _planted()
    graph = _graph(model, (x,))
    norm = graph.weight_node("norm.weight")
    graph.set_weight(norm, graph.weight(norm) * float("inf"))
    with pytest.raises(SamplesError, match=r"inputs of linear.* NaN or infinite"):
        _fold(graph, FoldScales(strategy), Samples.of([{"x": x}]))
