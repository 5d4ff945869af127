"""Branch similarity against the definition, on values from the hooks of the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lamella.data import Samples
from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.passes.analyses.branch_similarity import BranchSimilarity
from lamella.passes.base import Analyses
from lamella.rewrite.canonicalize import canonicalize


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())


def test_branches_are_compared_with_the_residual_included(
    captured: Callable[[str], Graph],
    model: Callable[[str], nn.Module],
    sample_inputs: Callable[..., dict[str, Tensor]],
):
    module = model("llama")
    stream: list[Tensor] = []
    for layer in module.model.layers:
        layer.register_forward_pre_hook(lambda _, args: stream.append(args[0]))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: stream.append(args[0])
        )
        layer.register_forward_hook(lambda _, args, output: stream.append(output))
    batch = sample_inputs("llama", 3, 8, 0)
    batch["attention_mask"][0, 5:] = 0
    with torch.no_grad():
        module(**batch)
    stream = [value[batch["attention_mask"].bool()] for value in stream]
    report = Analyses(captured("llama"), Samples.of([batch])).get(BranchSimilarity())
    for index in range(3):
        entry, middle, leaving = stream[3 * index : 3 * index + 3]
        names = [name for name in report.sublayers if f"layers.{index}" in name]
        attention, mlp = (report.sublayers[name] for name in names)
        assert [report.kinds[name] for name in names] == ["attention", "mlp"]
        # Two float32 runs of the model with other kernels.
        assert attention == pytest.approx(distance(entry, middle), abs=1e-5)
        assert mlp == pytest.approx(distance(middle, leaving), abs=1e-5)
        block = report.blocks[f"model.layers.{index}"]
        assert block == pytest.approx(distance(entry, leaving), abs=1e-5)
    assert list(report.of_kind("mlp").values()) == [
        value for name, value in report.sublayers.items() if report.kinds[name] == "mlp"
    ]


def test_parallel_branches_are_scored_each_for_itself():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.qkv = nn.Linear(16, 48)
            self.out = nn.Linear(16, 16)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            q, k, v = self.qkv(y).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            heads = functional.scaled_dot_product_attention(q, k, v)
            attention = self.out(heads.transpose(1, 2).flatten(-2))
            return attention, self.down(functional.gelu(self.up(y)))

        def forward(self, x: Tensor) -> Tensor:
            attention, mlp = self.branches(x)
            return x + (attention + mlp)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Linear(4, 16)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    net = Net().eval()
    x = torch.randn(4, 6, 4)
    graph = capture_module(net, {"x": torch.randn(2, 5, 4)}, dynamic={"x": [0, 1]})
    canonicalize(graph)
    report = Analyses(graph, Samples.of([{"x": x}])).get(BranchSimilarity())
    with torch.no_grad():
        stream = net.start(x)
        attention, mlp = net.blocks[0].branches(stream)
    first = list(report.sublayers.values())[:2]
    # Rounding of float32 cosines.
    assert first == pytest.approx(
        [distance(stream, stream + attention), distance(stream, stream + mlp)], abs=1e-6
    )


def test_images_are_compared_pixel_by_pixel(
    captured: Callable[[str], Graph],
    model: Callable[[str], nn.Module],
    sample_inputs: Callable[..., dict[str, Tensor]],
):
    module = model("convnext")
    seen: list[tuple[Tensor, Tensor]] = []
    layer = module.convnext.encoder.stages[0].layers[0]
    layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    batch = sample_inputs("convnext", 2, 0, 0)
    with torch.no_grad():
        module(**batch)
    ((entry, leaving),) = seen
    report = Analyses(captured("convnext"), Samples.of([batch])).get(BranchSimilarity())
    expected = distance(entry.movedim(1, -1), leaving.movedim(1, -1))
    # Two float32 runs of the model with other kernels.
    assert next(iter(report.blocks.values())) == pytest.approx(expected, abs=1e-5)
