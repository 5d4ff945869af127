"""What an emission gives: a graph that computes relevance, and how it runs in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lamella.ir.graph import Graph
from lamella.ir.in_place import in_place
from lamella.ir.storage import set_tensor
from lamella.passes.relevance.ledger import Entry

SCALE = "relevance_scale"
"""Name of the weight that a seed in float16 is multiplied by."""

DEFAULT_SCALE = 2.0**6
"""The factor in the graph itself, for whoever runs it elsewhere."""

_SCALES = (2.0**12, 2.0**6, 1.0, 2.0**-6)
"""Factors that are tried in this order until nothing overflows."""


@dataclass(frozen=True)
class RelevanceGraph:
    """A graph that computes relevance.

    Attributes:
        graph: Called with the inputs of the model by name, and ``seed`` unless the request has a
            seed of its own. Gives a dict: the outputs of the model by their names;
            ``"relevance.<input>"`` for each source; ``"tap.<name>"``; with taps or a ledger
            ``"start"`` (``<seed, output>`` in float64); and with a ledger the vectors
            ``"ledger.inputs"`` (the sum of each source) and ``"ledger.leaks"``.
        sources: What relevance is asked for: name of an input -> name of the node whose value it
            is the relevance of (the input itself, or the embedding of an integer input).
        ledger: What the entries of ``"ledger.leaks"`` are.
        reached: Names of the nodes that have a coefficient.
        replaced: Nodes of the model that were folded into others -> the node of the same value.
        results: Names of the outputs that are relevance, no outputs of the model.
        is_scaled: Whether coefficients are float16: the seed is multiplied by a factor, and
            what the graph gives is divided by it, so that small ones stay numbers.
    """

    graph: Graph = field(repr=False)
    sources: dict[str, str]
    ledger: tuple[Entry, ...] = field(default=(), repr=False)
    reached: tuple[str, ...] = field(default=(), repr=False)
    replaced: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    results: frozenset[str] = field(default=frozenset(), repr=False)
    is_scaled: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run the graph in PyTorch: as calling `graph`, in less time and memory.

        Where coefficients are float16 and overflow, it runs again with a smaller seed; what is
        not finite after all is given as it is. Weights that are replaced in `graph` after the
        first call are not seen.
        """
        values = self.graph.signature.flatten(args, kwargs)
        if not self.is_scaled or self._running is None:
            return self._found(values)
        found: dict[str, Any] = {}
        for scale in _SCALES:
            set_tensor(self._running, SCALE, torch.tensor(scale))
            found = self._found(values)
            if all(_is_finite(found[name]) for name in self.results):
                break
        return found

    def _found(self, values: Iterable[Any]) -> dict[str, Any]:
        with torch.no_grad():
            running = self._running
            found = self.graph.run(values) if running is None else running(*values)
        return self.graph.signature.unflatten(found)

    @functools.cached_property
    def _running(self) -> fx.GraphModule | None:
        """The module that runs; None where weights are not in memory."""
        loaded = all(map(self.graph.is_loaded, self.graph.weight_nodes()))
        return in_place(self.graph) if loaded else None


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())
