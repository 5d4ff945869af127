"""Relevance graphs of all families under all presets."""

from __future__ import annotations

import pytest
import torch

from lamella.ir.torch_private import tree_leaves
from lamella.rules.relevance.presets import PRESETS
from tests.conftest import _canonical, family_of
from tests.zoo.relevance_runs import (
    autograd_relevance,
    double_inputs,
    in_double,
    relevance_graph,
    seed_of,
)


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_the_gradient_preset_is_autograd_times_input(family: str):
    """At the inputs and at every block boundary, in float64."""
    made = relevance_graph(family, "gradient")
    inputs, seed = family_of(family).inputs(), seed_of(family)
    got = in_double(made.graph)(**double_inputs(inputs), seed=seed)
    exits = {name[4:] for name in got if name.startswith("tap.")}
    assert len(exits) >= 3
    want = autograd_relevance(family, inputs, set(made.sources.values()), exits, seed)
    for name, node in made.sources.items():
        # A few hundred operations in float64; the bound of issue 4.
        assert _distance(got[f"relevance.{name}"], want[node]) <= 1e-9
    for name in exits & want.keys():
        assert _distance(got[f"tap.{name}"], want[name]) <= 1e-9


def test_sizes_other_than_those_of_the_capture(family: str):
    """Nothing of the sample is baked into the graph."""
    sizes = family_of(family).sizes()
    made = relevance_graph(family, "gradient")
    batch, sequence = sizes[-1]
    inputs = family_of(family).inputs(batch, sequence, seed=1)
    seed = tree_leaves(_canonical(family)(**inputs))[0].double()
    got = in_double(made.graph)(**double_inputs(inputs), seed=seed)
    want = autograd_relevance(family, inputs, set(made.sources.values()), set(), seed)
    for name, node in made.sources.items():
        assert _distance(got[f"relevance.{name}"], want[node]) <= 1e-9


@pytest.mark.parametrize("preset", PRESETS)
def test_the_ledger_closes(family: str, preset: str):
    made = relevance_graph(family, preset)
    inputs, seed = family_of(family).inputs(), seed_of(family)
    wide = in_double(made.graph)(**double_inputs(inputs), seed=seed)
    narrow = made.graph(**inputs, seed=seed.float())
    for values, bound in ((wide, 1e-11), (narrow, 1e-4)):
        start = values["start"]
        rest = start - values["ledger.inputs"].sum() - values["ledger.leaks"].sum()
        # Sums telescope: what is left is the rounding of the coefficients.
        assert abs(float(rest / start)) <= bound
        found = [v for k, v in values.items() if k.startswith(("relevance.", "ledger.", "tap."))]
        assert all(bool(torch.isfinite(value).all()) for value in found)
    assert len(made.ledger) == wide["ledger.leaks"].numel()
    assert sum(bool(value.abs().sum() > 0) for value in wide.values()) > len(made.sources)
