"""How much relevance a layer holds: the published score of LRP-QViT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from lamella.data import Samples
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.quantize import Format
from lamella.passes.base import Analyses
from lamella.passes.relevance.request import relevance_of
from lamella.passes.scores.base import BitScore, BitScoreReport, finite
from lamella.passes.scores.starts import Draws, all_seeds
from lamella.passes.scores.sweeps import Sweeps
from lamella.passes.scores.target import first_sequences, loss_target
from lamella.passes.sites import find_sites
from lamella.rules.relevance import amplified, contraction
from lamella.rules.relevance.presets import ATTNLRP, Preset

POSITIVE = Preset(
    "positive",
    ATTNLRP.table.override(
        {
            target: amplified.alpha_beta(opened, 1.0, 0.0, 1e-6)
            for target, opened in contraction.LAYERS.items()
        }
    ),
)
"""z+ in every layer, products in halves, the rest as in `attnlrp`."""


@dataclass(frozen=True)
class LrpQvit(BitScore):
    """The share of a layer in all relevance times the error of its width, ``Omega_l 4^-b``.

    ``Omega_l = E sum_i |R_l,i| / sum_l' E sum_i |R_l',i|`` over the results of all layers that
    multiply matrices, attention among them; a weight that several layers read has their sum.
    Relevance starts at the largest logit. What is inside of the layer has no part in it: two
    layers with one share lose the same, however their weights round. It orders, and does not
    predict: better than `weight-error`, at least as good as `lim`, and worse than `fisher` and
    `relevance` (``benchmarks/scores``).

    The paper's rules are those of Chefer and others: z+ in linear layers, halves for products,
    pass-through elsewhere. Here softmax and attention go by the gradient, activations by their
    secant and norms are held fixed, which divides by nothing small; sums are over one sequence
    at a time. Where an output is no logits its largest entry takes their place.

    Attributes:
        formats: The formats to score.
        sequences: How many sequences of the samples run, one at a time.

    Raises:
        ValueError: `sequences` is smaller than 1.

    References:
        [Ranjan2024]; the normalization and the error of a width are choices made here.
    """

    name: ClassVar[str] = "lrp-qvit"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    sequences: int = 32

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"sequences must be at least 1, got {self.sequences}")

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """One forward run and one sweep for each sequence."""
        samples = first_sequences(analyses.need_samples(), self.sequences)
        shares = layer_shares(graph, samples)
        losses: dict[str, dict[Format, float]] = {}
        for site in find_sites(graph):
            share = sum(shares.get(reader.name, 0.0) for reader in site.readers)
            share = finite(share, site.weight)
            losses[site.weight] = {
                f: 0.0 if f.bits == 32 else share * 4.0**-f.bits for f in self.formats
            }
        return BitScoreReport(self.name, losses, "relative")


def layer_shares(graph: Graph, samples: Samples) -> dict[str, float]:
    """Name of each layer that multiplies matrices (and each embedding) -> its share ``Omega``.

    Shares of all layers but embeddings add up to 1; an embedding is measured in the same unit.

    Args:
        graph: Of the model.
        samples: They run one sequence at a time.
    """
    target = loss_target(graph)
    layers = [node.name for node in graph.nodes if _multiplies(node)]
    tables = [node.name for node in graph.find(aten.embedding.default)]
    sweeps = Sweeps(graph, POSITIVE, target, [*layers, *tables], [*layers, *tables])
    masses = dict.fromkeys([*layers, *tables], 0.0)

    def see(name: str, coefficient: Tensor) -> None:
        relevance = relevance_of(sweeps.value(name).double(), coefficient.double())
        masses[name] += float(relevance.abs().sum())

    for _, seed in all_seeds(samples, sweeps, target, Draws.of("logit", 1, 0)):
        sweeps.backward(seed, see)
    total = sum(masses[name] for name in layers) or 1.0
    return {name: mass / total for name, mass in masses.items()}


def _multiplies(node: Node) -> bool:
    facts = ops.facts(node.target) if node.op == "call_function" else None
    if facts is None or facts.category not in ("contraction", "attention"):
        return False
    return isinstance(node.meta["val"], Tensor) and node.meta["val"].is_floating_point()
