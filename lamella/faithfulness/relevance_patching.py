"""The effect of single activations, estimated for all of them from one sweep.

References:
    [Jafari2025]; [Syed2023], section 2, for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lamella.faithfulness.patch_effects import (
    Metric,
    PatchEffects,
    check_pair,
    explained_node,
    measured_metric,
    site_nodes,
)
from lamella.faithfulness.patch_sites import PatchSite
from lamella.ir.graph import Graph
from lamella.passes.scores.sweeps import Sweeps
from lamella.passes.scores.target import LossTarget
from lamella.rules.relevance.presets import Preset, preset_of


def relevance_patching(  # noqa: PLR0913  (those of activation patching, and the rules)
    graph: Graph,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any],
    sites: Iterable[PatchSite],
    metric: Metric,
    *,
    preset: str | Preset = "relp",
    output: str | int = 0,
) -> PatchEffects:
    """What `activation_patching` would measure, from two forwards and one sweep back.

    The estimate is ``<a_clean - a_corrupt, M>``, with M the coefficient of the activation in the
    corrupted run, where relevance starts from the gradient of the metric. Preset ``"gradient"``
    is attribution patching: M is the gradient.

    Args:
        graph: A canonical graph.
        clean: Inputs by name, a batch of pairs.
        corrupt: As `clean`, of the same shapes.
        sites: What is patched, for example `patch_sites`.
        metric: From the output to one number for each pair; differentiable.
        preset: The rules.
        output: Which flat output the metric is of, by name or number.

    Raises:
        GraphError: A site or the output is not in the graph.
        MissingRuleError: Some operators on the way have no rule; all are listed.
        ValueError: There are no sites, shapes don't fit, or the metric is not one number for
            each pair.

    References:
        [Jafari2025], equation 2; the coefficients are those of the emitted relevance graph.
    """
    nodes = site_nodes(graph, sites)
    target = LossTarget(explained_node(graph, output), "logits", None)
    names = list(dict.fromkeys(site.node for site in nodes))
    sweeps = Sweeps(graph, preset_of(preset), target, names, names)
    before = measured_metric(metric, sweeps.forward(clean))
    theirs = {name: sweeps.value(name) for name in names}
    end = sweeps.forward(corrupt)
    after = measured_metric(metric, end)
    changes: dict[str, Tensor] = {}
    for site in nodes:
        pair = theirs[site.node], sweeps.value(site.node)
        check_pair(*pair, site, len(after))
        changes[site.node] = pair[0].double() - pair[1].double()
    products = {name: torch.zeros_like(change) for name, change in changes.items()}

    def seen(name: str, coefficient: Tensor) -> None:
        products[name] = changes[name] * coefficient.double()

    sweeps.backward(_gradient(metric, end), seen)
    return PatchEffects(
        {site: _summed(products[site.node], site.units) for site in nodes}, before, after
    )


def _gradient(metric: Metric, output: Tensor) -> Tensor:
    """Of the metric with respect to the output; pairs do not mix."""
    with torch.enable_grad():
        leaf = output.detach().requires_grad_()
        return torch.autograd.grad(metric(leaf).sum(), leaf)[0]


def _summed(product: Tensor, units: tuple[int, ...]) -> Tensor:
    """Sums over all axes but the pairs and the units, in the order of the units."""
    rest = [axis for axis in range(1, product.ndim) if axis not in units]
    ordered = product.permute(0, *units, *rest)
    return ordered.sum(tuple(range(1 + len(units), product.ndim))) if rest else ordered
