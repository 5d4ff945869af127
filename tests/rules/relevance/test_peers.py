"""Presets beside zennit and Captum, which are no dependency: skipped where they are missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.ir.capture import capture_module
from lamella.passes.relevance.emit import emit
from lamella.rewrite.canonicalize import canonicalize
from lamella.rules.relevance import presets
from lamella.rules.relevance.presets import Preset

# The bound of issue 4 for peers in float64.
RELATIVE = 1e-8


class Vgg(nn.Module):
    """Convolutions in pairs, max-pooling, two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def model_of(kind: type[nn.Module], **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(**options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # zennit leaves the epsilon of a norm that it has merged.
                module.eps = 1e-14
                nn.init.normal_(module.weight, 1.0, 0.2)
                nn.init.normal_(module.bias, 0.0, 0.2)
                module.running_mean.normal_(0.0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.double().eval()


def ours(model: nn.Module, x: Tensor, preset: Preset, start: Tensor) -> Tensor:
    """Relevance of `x` when the output has the relevance `start`."""
    graph = capture_module(model, {"x": x})
    canonicalize(graph)
    return emit(graph, preset).graph(x=x, seed=start / model(x).detach())["relevance.x"]


def images(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64) * 4 - 2


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=RELATIVE, atol=RELATIVE * float(want.abs().max()))


def epsilon_everywhere(stabilizer: float) -> Preset:
    from lamella.rules.relevance.contraction import layers

    return Preset("epsilon", presets.CP.table.override(layers(stabilizer)), fold_batch_norms=True)


def zennit_composites(zennit: Any) -> dict[str, tuple[Any, Preset]]:
    """Composites and the presets of ours that follow the same definitions."""
    rules, composites, types = zennit.rules, zennit.composites, zennit.types
    tiny = 1e-14
    base = [
        (types.Activation, rules.Pass()),
        (zennit.layer.Sum, rules.Norm(stabilizer=tiny)),
        (types.BatchNorm, rules.Pass()),
    ]

    def of(convolution: Any, dense: Any) -> Any:
        layers = [(types.Convolution, convolution), (nn.Linear, dense)]
        return lambda canonizers: composites.LayerMapComposite([*base, *layers], canonizers)

    def boxed(canonizers: Any) -> Any:
        # One number per channel, as zennit expands them.
        low = torch.full((1, 3, 8, 8), -3.0, dtype=torch.float64)
        layers = [(types.Convolution, rules.Gamma(0.25, stabilizer=tiny))]
        layers.append((nn.Linear, rules.Epsilon(1e-6)))
        first = [(types.Convolution, rules.ZBox(low=low, high=-low, stabilizer=1e-6))]
        return composites.SpecialFirstLayerMapComposite([*base, *layers], first, canonizers)

    return {
        "epsilon": (of(rules.Epsilon(1e-2), rules.Epsilon(1e-2)), epsilon_everywhere(1e-2)),
        "gamma": (
            of(rules.Gamma(0.25, stabilizer=tiny), rules.Gamma(0.05, stabilizer=tiny)),
            presets.gamma(0.25, 0.05),
        ),
        "eps-plus": (of(rules.ZPlus(1e-6), rules.Epsilon(1e-6)), presets.PRESETS["eps-plus"]),
        "alpha2-beta1": (
            of(rules.AlphaBeta(2.0, 1.0, 1e-6), rules.Epsilon(1e-6)),
            presets.PRESETS["alpha2-beta1"],
        ),
        "eps-gamma-box": (boxed, presets.PRESETS["eps-gamma-box"]),
    }


def residual_block(zennit: Any) -> type[nn.Module]:
    """A residual network as zennit wants it written: its sum is a module."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.branch = nn.Sequential(
                *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
                *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
            )
            self.sum, self.relu, self.flat = zennit.layer.Sum(), nn.ReLU(), nn.Flatten()
            self.head = nn.Linear(512, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.relu(self.sum(torch.stack((self.branch(x), x), dim=-1)))
            return self.head(self.flat(x))

    return Residual


NOT_INSTALLED = "a peer to compare with, no part of the test extra: zennit brings torchvision"

CASES = ["epsilon", "gamma", "eps-plus", "alpha2-beta1", "eps-gamma-box"]


@pytest.mark.parametrize("kind", ["vgg", "resnet"])
@pytest.mark.parametrize("case", CASES)
def test_convolution_networks_are_as_in_zennit(case: str, kind: str):
    pytest.importorskip("zennit.core", reason=NOT_INSTALLED, exc_type=ImportError)
    import zennit.canonizers
    import zennit.composites
    import zennit.layer
    import zennit.rules
    import zennit.types

    make, preset = zennit_composites(zennit)[case]
    model = model_of(Vgg if kind == "vgg" else residual_block(zennit))
    x = images()
    start = torch.eye(5, dtype=torch.float64)[[1, 3]] * model(x).detach()
    got = ours(model, x, preset, start)
    canonizers = [zennit.canonizers.SequentialMergeBatchNorm()]
    leaf = x.clone().requires_grad_()
    with make(canonizers).context(model) as hooked:
        (want,) = torch.autograd.grad(hooked(leaf), leaf, start)
    assert_same(got, want)


def test_a_perceptron_is_as_in_captum():
    attr = pytest.importorskip("captum.attr", reason=NOT_INSTALLED, exc_type=ImportError)
    from captum.attr._utils.lrp_rules import EpsilonRule

    class Mlp(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)
            )

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = model_of(Mlp)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    target = torch.tensor([1, 0, 3])
    start = torch.eye(4, dtype=torch.float64)[target] * model(x).detach()
    got = ours(model, x, epsilon_everywhere(1e-3), start)
    for module in model:
        if isinstance(module, nn.Linear):
            module.rule = EpsilonRule(epsilon=1e-3)
    want = attr.LRP(model).attribute(x.requires_grad_(), target=target).detach()
    assert_same(got, want)
