"""Coverage: every node that carries a signal has a rule, and relevance really passes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamella.ir.ops import aten, lam
from lamella.rules.relevance.presets import PRESETS, Preset
from lamella.rules.relevance.rule import nothing
from tests.conftest import family_of
from tests.zoo.autograd_nodes import count_as_published, count_nodes, states_not_zero
from tests.zoo.relevance_coverage import Stop, coverage

_SCANS = (lam.selective_scan.default, lam.head_scan.default)
_ATTENTION = aten.scaled_dot_product_attention.default

# Step sizes and projections of scans, divisors that are norms, a sigmoid that gates its own input.
ATTNLRP: set[Stop] = {
    *((scan, name) for scan in _SCANS for name in ("delta", "b", "c")),
    *((aten.div.Tensor, "other"), (aten.mul.Tensor, "other")),
}
# And what weighs: queries and keys, probabilities, gates.
CP: set[Stop] = {
    *ATTNLRP,
    *((_ATTENTION, "query"), (_ATTENTION, "key"), (aten.softmax.int, "self")),
    *((aten.matmul.default, "self"), (aten.mul.Tensor, "self")),
}
HOLD: dict[str, set[Stop]] = {
    "gradient": set(),
    **dict.fromkeys(("attnlrp", "relp", "mamba"), ATTNLRP),
    **dict.fromkeys(("cp", "gamma", "eps-gamma-box", "eps-plus", "alpha2-beta1"), CP),
}
"""Preset -> the operands that its rules may hold fixed; all others get relevance."""


def assert_covered(family: str, preset: str) -> None:
    found = coverage(family, preset)
    assert len(found.nodes) > 30
    assert not found.without_rule
    assert not found.lost
    assert found.stops <= HOLD[preset]
    # What nobody gives relevance is held fixed by somebody.
    assert bool(found.stops) == bool(found.held)
    assert len(found.passed) + len(found.held) == len(found.nodes)


@pytest.mark.parametrize("preset", ["gradient", "attnlrp", "cp"])
def test_relevance_passes_every_node(family: str, preset: str):
    """Under the gradient nothing is held fixed, so that all nodes are passed."""
    assert_covered(family, preset)


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("gradient", "attnlrp", "cp")])
@pytest.mark.parametrize("kind", ["llama", "resnet", "mamba"])
def test_relevance_passes_every_node_under_other_presets(kind: str, preset: str):
    assert_covered(kind, preset)


def test_a_rule_that_gives_nothing_is_noticed():
    """The count does not rest on what the rules say of themselves."""
    silent = PRESETS["gradient"].table.override({aten.silu.default: nothing})
    found = coverage("llama", Preset("silent", silent))
    assert found.stops == {(aten.silu.default, "self")}
    # The projections that the three gates read.
    assert len(found.held) == 3


def test_a_coefficient_of_zero_is_noticed():
    dead = PRESETS["gradient"].table.override({aten.silu.default: lambda m, y, x: (m * 0.0,)})
    found = coverage("llama", Preset("dead", dead))
    assert len(found.lost) == 3
    assert not found.held


def _has_rule(target: object) -> bool:
    return target in PRESETS["gradient"].table


STARTS_AT_ZERO = {"mamba": 3, "mamba2": 12}
"""Nodes that no gradient passes: what the decay of the first step does to a state of zero."""


def test_every_node_of_autograd_has_a_rule_and_passes_relevance(family: str):
    """Coverage as systems count it that walk the graph of autograd; see `autograd_nodes`."""
    model, inputs = family_of(family).build(), family_of(family).inputs()
    count = count_nodes(model, inputs, _has_rule)
    assert count.nodes > 30
    assert not count.without_rule
    assert count.not_passed.total() == STARTS_AT_ZERO.get(family, 0)


def test_every_node_has_a_rule_as_published_systems_count(family: str):
    model, inputs = family_of(family).build(), family_of(family).inputs()
    nodes, without = count_as_published(model, inputs, _has_rule)
    assert nodes > 50
    assert not without


def test_nodes_are_counted_as_published():
    """VGG16 has 90 nodes in table 5 of [Lee2025]; widths do not matter to that."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (2, 2, 0, 4, 4, 0, *(8, 8, 8, 0) * 3):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    layers += [nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)]
    nodes, without = count_as_published(_Named(*layers), {"x": torch.ones(1, 3, 32, 32)}, _has_rule)
    assert nodes == 90
    assert not without


class _Named(nn.Sequential):
    """Layers whose input has a name, and whose output is a mapping, as those of transformers."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": super().forward(x)}


@pytest.mark.parametrize("kind", STARTS_AT_ZERO)
def test_every_node_of_a_scan_is_passed_from_a_state_that_is_not_zero(kind: str):
    """So the only reason is that zero: it is a factor of what those nodes get."""
    model, inputs = family_of(kind).build(), family_of(kind).inputs()
    with states_not_zero():
        count = count_nodes(model, inputs, _has_rule)
    assert not count.without_rule
    assert not count.not_passed


def test_presets_have_rules_for_the_same_operators():
    """So that what is covered under the gradient is covered under all."""
    covered = {name: set(dict(preset.table.items())) for name, preset in PRESETS.items()}
    assert all(found == covered["gradient"] for found in covered.values())
