"""Interpolated weights: those of the models interpolated by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lamella.errors import LamellaError, PassError
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.passes.base import Analyses
from lamella.passes.transforms.blend_weights import BlendWeights, parse_ratios
from lamella.passes.transforms.drop_blocks import DropBlocks
from lamella.passes.transforms.fold_norms import FoldNorms
from lamella.rewrite.canonicalize import canonicalize

# One rounding of float32 more or less per weight.
_CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def _other(model: nn.Module, seed: int = 5) -> nn.Module:
    """The same architecture with weights that are half as large and shifted by noise."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in twin.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.5 * parameter.data + 0.02 * noise
    return twin


def _by_hand(model: nn.Module, other: nn.Module, ratio: Callable[[str], float]) -> nn.Module:
    blended = copy.deepcopy(model)
    theirs = dict(other.named_parameters())
    for name, parameter in blended.named_parameters():
        r = ratio(name)
        parameter.data = (1 - r) * parameter.data + r * theirs[name].data
    return blended


def _blend(graph: Graph, other: Any, **options: Any) -> None:
    BlendWeights(other, **options).run(graph, Analyses(graph))
    graph.finish()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "file"),
        ("gpt2", "module"),
        ("gpt2", "folder"),
        ("gemma2", "graph"),
        ("gemma2", "file"),
        ("gemma2", "folder"),
        ("resnet", "module"),
    ],
)
def test_equals_models_blended_by_hand(
    family: str,
    kind: str,
    captured: Callable[[str], Graph],
    model: Callable[[str], nn.Module],
    sample_inputs: Callable[..., dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    graph, first, inputs = captured(family), model(family), sample_inputs(family)
    second = _other(first)
    given: Any = second
    if kind == "graph":
        given = capture_module(second, inputs)
        canonicalize(given)
    elif kind in ("file", "folder"):
        second.save_pretrained(tmp_path)
        given = tmp_path / "model.safetensors" if kind == "file" else str(tmp_path)
    if family == "gemma2" and kind == "file":
        # Its norms are computed from the parameters, and a file alone can't be captured.
        with pytest.raises(PassError, match="_folded is missing"):
            _blend(graph, given, ratio=0.3)
        return
    _blend(graph, given, ratio=0.3)
    want = _by_hand(first, second, lambda _: 0.3)
    with torch.no_grad():
        torch.testing.assert_close(graph(**inputs)[0], want(**inputs)[0], **_CLOSE)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_ends_are_the_models(
    ratio: float,
    captured: Callable[[str], Graph],
    model: Callable[[str], nn.Module],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph, first, inputs = captured("llama"), model("llama"), sample_inputs("llama")
    second = _other(first)
    _blend(graph, second, ratio=ratio)
    with torch.no_grad():
        want = (second if ratio else first)(**inputs)[0]
    torch.testing.assert_close(graph(**inputs)[0], want, **_CLOSE)


def test_a_ratio_per_block(
    captured: Callable[[str], Graph],
    model: Callable[[str], nn.Module],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph, first, inputs = captured("llama"), model("llama"), sample_inputs("llama")
    second = _other(first)

    def ratio(name: str) -> float:
        found = re.search(r"layers\.(\d)", name)
        return {None: 0.1, "0": 0.2, "1": 0.8, "2": 0.8}[found and found[1]]

    _blend(graph, second, ratio=0.1, ratios=("0:0.2", "1-2:0.8"))
    want = _by_hand(first, second, ratio)
    with torch.no_grad():
        torch.testing.assert_close(graph(**inputs)[0], want(**inputs)[0], **_CLOSE)


def test_neither_model_is_written_to(
    captured: Callable[[str], Graph], model: Callable[[str], nn.Module]
) -> None:
    graph, second = captured("llama"), _other(model("llama"))
    kept = graph.copy()
    before = {str(n.target): graph.weight(n).clone() for n in graph.weight_nodes()}
    theirs = {name: value.clone() for name, value in second.state_dict().items()}
    _blend(graph, second, ratio=0.5)
    assert all(torch.equal(kept.weight(name), value) for name, value in before.items())
    assert all(torch.equal(second.state_dict()[name], value) for name, value in theirs.items())


def test_another_architecture_is_refused_with_all_differences(
    captured: Callable[[str], Graph], model: Callable[[str], nn.Module]
) -> None:
    graph = captured("llama")
    before = graph.edits
    with pytest.raises(PassError, match=r"another architecture: .* is missing, .* and \d+ more"):
        _blend(graph, model("bert"))
    wider = _other(model("llama"))
    wider.get_submodule("model.layers.1.mlp.up_proj").weight = nn.Parameter(torch.zeros(80, 32))
    with pytest.raises(PassError, match=r"up_proj.weight is \[80, 32\] instead of \[64, 32\]"):
        _blend(graph, wider)
    deeper = _other(model("llama"))
    deeper.get_submodule("model.layers").append(
        copy.deepcopy(deeper.get_submodule("model.layers.0"))
    )
    with pytest.raises(PassError, match=r"model.layers.3.* has no counterpart"):
        _blend(graph, deeper)
    assert graph.edits == before


def test_fewer_blocks_after_a_drop_are_no_other_architecture(
    captured: Callable[[str], Graph], model: Callable[[str], nn.Module]
) -> None:
    graph = captured("llama")
    DropBlocks(blocks=(1,)).run(graph, Analyses(graph))
    _blend(graph, _other(model("llama")))


def test_comes_before_folding(
    captured: Callable[[str], Graph], model: Callable[[str], nn.Module]
) -> None:
    graph = captured("vit")
    FoldNorms().run(graph, Analyses(graph))
    graph.finish()
    with pytest.raises(PassError, match="blend-weights has to come first"):
        _blend(graph, model("vit"))


def test_files_that_are_none(captured: Callable[[str], Graph], tmp_path: Path) -> None:
    with pytest.raises(LamellaError, match="no file or folder"):
        _blend(captured("llama"), str(tmp_path / "nothing"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 100)
    with pytest.raises(LamellaError):
        _blend(captured("llama"), broken)
    save_file({"weight": torch.ones(2)}, tmp_path / "small.safetensors")
    with pytest.raises(PassError, match="another architecture"):
        _blend(captured("llama"), tmp_path / "small.safetensors")


def test_bad_options(captured: Callable[[str], Graph], model: Callable[[str], nn.Module]) -> None:
    for options in ({"ratio": 1.5}, {"ratio": -0.1}, {"ratios": ("0:2",)}):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            BlendWeights("x", **options)
    with pytest.raises(ValueError, match="expected block:ratio"):
        BlendWeights("x", ratios=("0=0.2",))
    with pytest.raises(ValueError, match="block 4 has two ratios"):
        parse_ratios(("3-5:0.2", "4:0.1"))
    with pytest.raises(PassError, match="there is no block 7"):
        _blend(captured("llama"), model("llama"), ratios=("7:0.5",))
