"""What rounding a weight does to the output, by the relevance of the layers that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.operators import round_to_int8
from lamella.ir.ops import aten
from lamella.ir.quantize import Format
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, finite
from lamella.passes.scores.fisher import groups_in_memory, rounding_errors
from lamella.passes.scores.starts import DRAWN, Draws, all_seeds, check_options
from lamella.passes.scores.sweeps import Sweeps
from lamella.passes.scores.target import LossTarget, first_sequences, loss_target
from lamella.passes.sites import Site, find_sites
from lamella.rules.relevance.presets import Preset, preset_of


@dataclass(frozen=True)
class RelevanceBits(BitScore):
    """The first-order effect of rounding a weight, squared: ``1/2 E[<W' - W, x^T M>^2]``.

    `M` is the coefficient of what a layer computes from its input `x`; an embedding has those
    of the rows it reads. With `int8_activations` the rounding of the inputs adds
    ``1/2 E sum ((x' - x) M W)^2``, entry by entry, since its errors have no common direction.
    One forward run of a sequence and one sweep for each start give all weights in all formats;
    the gradient of one weight is alive at a time.

    At the clean point the KL divergence is of second order, so that a seed has to stand for its
    curvature: labels that are drawn from the model itself have the Fisher matrix as the second
    moment of their gradients. That start and preset ``gradient`` (both the defaults) are the
    estimate of `fisher` from an emitted graph, and predict the KL divergence per token; `fisher`
    estimates the rounding of inputs from its variance instead.

    Beside the measured loss of each single rounding (``benchmarks/scores``) every conserving
    preset ranked worse than the gradient: ``relp`` by little, ``attnlrp`` by more, and ``cp``,
    which gives queries and keys nothing, plans worse than the error of the weight alone. The
    largest logit ranked better than drawn labels on a classifier that is sure of itself, and
    worse on a language model.

    Attributes:
        formats: The formats to score.
        int8_activations: Whether the kernel rounds its input to 8 bits.
        preset: Name of the rules, or a preset. The unit is that of a loss for ``gradient`` from
            drawn labels; otherwise the score only orders.
        start: As in `RelevanceScore`.
        sequences: How many sequences of the samples run, one at a time.
        draws: Starts per sequence, where they are drawn.
        seed: Of the draws.

    Raises:
        ValueError: An option has another value.

    References:
        [Jafari2025], with the rounded weight as the value in the other run; [Martens2020],
        section 5, for drawn labels.
    """

    name: ClassVar[str] = "relevance"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    int8_activations: bool = True
    preset: str | Preset = "gradient"
    start: str = DRAWN
    sequences: int = 32
    draws: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self.preset, self.start, self.sequences, self.draws)

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Run the sequences once for every gigabyte of errors.

        Raises:
            SamplesError: There are no samples.
            GraphError: No output is a distribution or a vector.
        """
        analyses.need_samples()
        target = loss_target(graph)
        rounded = tuple(f for f in self.formats if f.bits != 32)
        losses: dict[str, dict[Format, float]] = {}
        unseen: list[str] = []
        for sites in groups_in_memory(find_sites(graph), len(rounded)):
            effects = _Effects(graph, sites, rounded, int8_activations=self.int8_activations)
            scale = 0.5 / self._sweep(graph, analyses, target, effects)
            unseen += [site.weight for site in sites if not effects.reached(site)]
            for site in sites:
                found = dict(zip(rounded, (effects.squares(site) * scale).tolist(), strict=True))
                losses[site.weight] = {
                    f: finite(found.get(f, 0.0), site.weight) for f in self.formats
                }
        predicts = preset_of(self.preset).name == "gradient" and self.start == DRAWN
        unit = target.unit if predicts else "relative"
        told = f"no relevance reaches these weights, which score 0: {', '.join(unseen)}"
        return BitScoreReport(self.name, losses, unit, remarks=(told,) if unseen else ())

    def _sweep(
        self, graph: Graph, analyses: Analyses, target: LossTarget, effects: _Effects
    ) -> float:
        """Collect `effects` over all sequences; returns tokens times starts per sequence."""
        samples = first_sequences(analyses.need_samples(), self.sequences)
        readers = effects.readers
        sweeps = Sweeps(graph, preset_of(self.preset), target, readers, readers.values())
        draws = Draws.of(self.start, self.draws, self.seed)
        tokens = 0
        for more, seed in all_seeds(samples, sweeps, target, draws):
            tokens += more or 0
            sweeps.backward(seed, lambda name, m: effects.see(name, m, sweeps))
            effects.finish()
        return max(tokens, 1) * draws.per_sequence


class _Effects:
    """First-order effects of the errors of some weights, added up over sweeps.

    Attributes:
        readers: Name of each layer that reads one of the weights -> name of what it reads.
    """

    def __init__(
        self,
        graph: Graph,
        sites: Sequence[Site],
        formats: tuple[Format, ...],
        *,
        int8_activations: bool,
    ) -> None:
        """Round the weights; `formats` are those that change something."""
        self._formats = formats
        self._int8 = int8_activations
        self._site_of = {reader.name: site for site in sites for reader in site.readers}
        self.readers = {node.name: _read(node).name for site in sites for node in site.readers}
        self._tables = {
            node.name
            for site in sites
            for node in site.readers
            if node.target is aten.embedding.default
        }
        self._weights = {site.weight: graph.weight(site.node).float() for site in sites}
        self._errors = {
            name: rounding_errors(weight, formats) for name, weight in self._weights.items()
        }
        self._running: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def see(self, name: str, coefficient: Tensor, sweeps: Sweeps) -> None:
        """The coefficient of what one layer computed; several layers may share a weight."""
        weight = self._site_of[name].weight
        rows = coefficient.reshape(-1, coefficient.shape[-1]).float()
        value = sweeps.value(self.readers[name])
        if name in self._tables:
            changes = self._errors[weight][:, value.reshape(-1)]
            found = torch.einsum("ftk,tk->f", changes, rows)
        else:
            read = value.reshape(-1, value.shape[-1]).float()
            found = self._errors[weight].flatten(1) @ (rows.t() @ read).flatten()
            if self._int8:
                self._add_squares(weight, self._of_inputs(weight, read, rows))
        self._running[weight] = self._running.get(weight, 0) + found.double()

    def finish(self) -> None:
        """A sweep is over: its effects are squared."""
        for weight, found in self._running.items():
            self._add_squares(weight, found.square())
        self._running.clear()

    def reached(self, site: Site) -> bool:
        """Whether a layer that reads the weight had a coefficient."""
        return site.weight in self._squares

    def squares(self, site: Site) -> Tensor:
        """The sum of squared effects in each format, float64 ``[formats]``."""
        none = torch.zeros(len(self._formats), dtype=torch.float64)
        return self._squares.get(site.weight, none)

    def _add_squares(self, weight: str, squares: Tensor) -> None:
        self._squares[weight] = self._squares.get(weight, 0) + squares

    def _of_inputs(self, weight: str, read: Tensor, rows: Tensor) -> Tensor:
        """``sum ((x' - x) M W)^2`` for the blocks of each format, ``[formats]``."""
        coefficient = rows @ self._weights[weight]
        by_block = {
            block: _squared_sum((round_to_int8(read, block) - read) * coefficient)
            for block in {f.block for f in self._formats}
        }
        return torch.tensor([by_block[f.block] for f in self._formats], dtype=torch.float64)


def _squared_sum(value: Tensor) -> float:
    return float(value.double().square().sum())


def _read(node: Node) -> Node:
    """What a layer or an embedding reads beside its weight."""
    is_table = node.target is aten.embedding.default
    return ops.bind(node)["indices" if is_table else "input"]
