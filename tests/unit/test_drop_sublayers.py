"""Dropped branches: the model with the branch's module giving zero."""

from __future__ import annotations

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
from lamella.passes.transforms.drop_sublayers import DropSublayers
from lamella.rewrite.canonicalize import canonicalize

# float32 sums in another order; outputs are of order one.
_CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

_BRANCHES = [
    ("llama", 2, "model.layers.1.self_attn"),
    ("llama", 5, "model.layers.2.mlp"),
    ("gemma2", 0, "model.layers.0.self_attn"),
    ("gemma2", 3, "model.layers.1.mlp"),
    ("gpt2", 2, "transformer.h.1.attn"),
    ("gpt2", 1, "transformer.h.0.mlp"),
    ("opt", 4, "model.decoder.layers.2.self_attn"),
    ("mixtral", 3, "model.layers.1.mlp"),
    ("qwen3_moe", 5, "model.layers.2.mlp"),
    ("vit", 2, "vit.layers.1.attention"),
    ("dinov2", 3, "encoder.layer.1.mlp"),
    ("whisper", 7, "model.decoder.layers.0.encoder_attn"),
    ("mamba", 1, "backbone.layers.1.mixer"),
]


def _run(graph: Graph, a_pass: DropSublayers, samples: Samples | None = None) -> Analyses:
    analyses = Analyses(graph, samples)
    a_pass.run(graph, analyses)
    graph.finish()
    return analyses


def _zero(module: nn.Module) -> None:
    """Let every floating tensor that `module` returns be zero."""

    def zeroed(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(
                torch.zeros_like(o) if isinstance(o, Tensor) and i == 0 else o
                for i, o in enumerate(output)
            )
        return torch.zeros_like(output)

    module.register_forward_hook(zeroed)


@pytest.mark.parametrize(("family", "index", "path"), _BRANCHES)
def test_equals_a_branch_that_gives_zero(
    family: str,
    index: int,
    path: str,
    captured: Callable[[str], Graph],
    model: Callable[[str], nn.Module],
    sample_inputs: Callable[..., dict[str, Tensor]],
) -> None:
    graph, inputs, eager = captured(family), sample_inputs(family), model(family)
    _zero(eager.get_submodule(path))
    part = graph.stream.sublayers[index]
    count = len(graph.stream.sublayers)
    _run(graph, DropSublayers(sublayers=(index,)))
    with torch.no_grad():
        want = eager(**inputs)
    torch.testing.assert_close(graph(**inputs)[0], want[0], **_CLOSE)
    assert len(graph.stream.sublayers) == count - 1
    assert graph.origin.dropped == (part.name,)


class _PostNorm(nn.Module):
    """Blocks ``norm(x + f(x))``; a block that is off passes its input on."""

    def __init__(self, on: tuple[bool, ...]) -> None:
        super().__init__()
        self.on = on
        self.up = nn.ModuleList(nn.Linear(8, 16) for _ in on)
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in on)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in on)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for on, up, down, norm in zip(self.on, self.up, self.down, self.norms, strict=True):
            if on:
                x = norm(x + down(torch.relu(up(x))))
        return self.head(x)


class _Scaled(_PostNorm):
    """``0.5 x + f(norm(x))``: the scalar belongs to the shortcut and stays."""

    def forward(self, x: Tensor) -> Tensor:
        for on, up, down, norm in zip(self.on, self.up, self.down, self.norms, strict=True):
            short = 0.5 * x
            x = short + down(torch.relu(up(norm(x)))) if on else short
        return self.head(x)


class _Parallel(nn.Module):
    """``x + attention(norm(x)) + mlp(norm(x))``, summed before the stream."""

    def __init__(self, on: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        self.on = on
        self.norm = nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = self.qkv(normed).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        arms = (self.out(mixed), self.down(torch.relu(self.up(normed))))
        kept = [arm for on, arm in zip(self.on, arms, strict=True) if on]
        return self.head(x + sum(kept) if kept else x)


def _twin(network: nn.Module, on: tuple[bool, ...]) -> nn.Module:
    twin: Any = type(network)(on)
    twin.load_state_dict(network.state_dict())
    return twin


@pytest.mark.parametrize("kind", [_PostNorm, _Scaled])
@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_norms_go_and_scalars_stay(kind: type[_PostNorm], gone: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = kind((True, True, True)).eval()
    for norm in network.norms:
        norm.weight.data = torch.rand(8) + 0.5
    x = torch.randn(2, 5, 8)
    graph = capture_module(network, (x,))
    canonicalize(graph)
    _run(graph, DropSublayers(sublayers=gone))
    want = _twin(network, tuple(i not in gone for i in range(3)))(x)
    torch.testing.assert_close(graph(x), want, **_CLOSE)


@pytest.mark.parametrize("gone", [(0,), (1,), (0, 1)])
def test_arms_of_a_parallel_block_go_alone_or_together(gone: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = _Parallel().eval()
    x = torch.randn(2, 5, 8)
    graph = capture_module(network, (x,))
    canonicalize(graph)
    assert [part.kind for part in graph.stream.sublayers] == ["attention", "mlp"]
    _run(graph, DropSublayers(sublayers=gone))
    want = _twin(network, tuple(i not in gone for i in range(2)))(x)
    torch.testing.assert_close(graph(x), want, **_CLOSE)


def test_kinds_and_guards(captured: Callable[[str], Graph]) -> None:
    graph = captured("llama")
    _run(graph, DropSublayers(count=1, kinds=("attention",), by="random"))
    assert graph.origin.dropped == ("model.layers.1.attention",)
    graph = captured("llama")
    _run(graph, DropSublayers(count=3, kinds=("mlp",), by="random", keep_first=0, keep_last=0))
    assert [block.kinds for block in graph.blocks] == [("attention",)] * 3
    with pytest.raises(PassError, match="2 sublayers can't go: 1 may"):
        _run(captured("llama"), DropSublayers(count=2, kinds=("mlp",), by="random"))
    with pytest.raises(PassError, match=r"sublayer 0 \(attention\) is not one of the kinds mlp"):
        _run(captured("llama"), DropSublayers(sublayers=(0,), kinds=("mlp",)))


def test_all_attention_can_go(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    graph = captured("llama")
    _run(graph, DropSublayers(sublayers=(0, 2, 4)))
    assert not graph.find(aten.scaled_dot_product_attention.default)
    assert torch.isfinite(graph(**sample_inputs("llama"))[0]).all()


def test_iterative_by_similarity(
    captured: Callable[[str], Graph], sample_inputs: Callable[..., dict[str, Tensor]]
) -> None:
    graph = captured("llama")
    samples = Samples.of([sample_inputs("llama", seed=1)])
    analyses = _run(graph, DropSublayers(count=2, iterative=True), samples)
    assert len(graph.stream.sublayers) == 4
    assert len(analyses.take_remarks()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either how many"),
        ({"count": 0}, "at least 1"),
        ({"count": 1, "kinds": ("mpl",)}, "unknown kind 'mpl'; did you mean 'mlp'"),
        ({"count": 1, "keep_last": -2}, "must not be negative"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DropSublayers(**options)
