"""A compiled relevance graph of convolutions gives the relevance of the one that runs in eager."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import lamella
from lamella.passes.relevance.emit import emit
from lamella.rules.relevance.presets import PRESETS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


class Vgg(nn.Sequential):
    """Two convolutions, max-pooling, a dense layer."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)),
        )


@pytest.mark.slow
def test_compiled_relevance_of_convolutions_is_that_of_eager():
    """Rules of gamma, whose adjoints of convolution and pooling are generated or called."""
    generator = torch.Generator().manual_seed(2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = lamella.capture(Vgg().eval(), {"input": torch.randn(2, 3, 8, 8)})
    emitted = emit(graph, PRESETS["gamma"]).graph
    compiled = lamella.lower(emitted, "aot")
    for batch in (2, 5):
        image = torch.randn(batch, 3, 8, 8, generator=generator)
        seed = torch.randn(batch, 5, generator=generator)
        got, want = compiled(input=image, seed=seed), emitted(input=image, seed=seed)
        assert set(got) == set(want) > {"relevance.input"}
        for name, value in want.items():
            # Fused kernels order their sums in another way; of the largest entry.
            bound = 1e-4 * float(value.abs().max())
            torch.testing.assert_close(got[name], value, rtol=0, atol=bound)
