"""What rounding a weight costs, from forward and backward runs of the unchanged model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.operators import round_to_int8
from lamella.ir.ops import aten
from lamella.ir.quantize import Format, dequantized
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, finite
from lamella.passes.scores.gradients import GradientRun, Watcher
from lamella.passes.scores.interactions import Interactions
from lamella.passes.scores.output_gradients import PROBES, Draws, OutputGradients, Taps
from lamella.passes.scores.target import loss_target
from lamella.passes.sites import Site, find_sites

_ERROR_BYTES = 1 << 30
"""Errors of weights that are in memory at a time; more weights mean more runs."""

_GRADIENT_BYTES = 1 << 22
"""Gradients of a weight by several sequences that are made at a time: what a cache holds."""


@dataclass(frozen=True)
class Fisher(BitScore):
    """The expected loss of rounding weights, from second-order information.

    The error D of a weight changes the loss by ``1/2 E[<G, D>^2]``, where G is the gradient of
    the loss of one sequence with respect to the weight. For logits the loss has the Fisher
    matrix of the model's own distribution as second moment, and the result estimates the KL
    divergence per token; for other outputs the gradient is that of random projections of the
    normalized output, and the result estimates ``1 - cos`` (see `drawn_loss`). With
    `int8_activations` the rounding of the inputs of linear layers adds
    ``1/2 E sum_k (h_k (x'_k - x_k))^2``, with h the gradient at the input by way of that layer:
    errors of rounding have no common direction, over channels or over tokens.

    Errors of all tokens of a sequence are added before they are squared: those of keys and
    values point the same way at every token. `fisher-gram` treats tokens and outputs as
    independent, and is off by more where they are not (vision transformers).

    It costs a forward run of each sequence, and for each draw a backward run and one product
    per weight, as a backward run of training: three forward runs with one draw, and for each
    format as many products as one more token of each sequence has. Tokens without a gradient
    (padding, or those that a classifier does not look at) save theirs. Weights are rounded once,
    which takes no products. More than a gigabyte of errors takes all runs once more. A draw of a
    sequence says little (the squares that are averaged spread by 1.4 times their mean), so
    sequences should be many rather than long: 112 of them need one draw each, and cost less than
    three forward runs of the customary 128.

    Sequences run in the batches of the samples, cut where a batch holds more than a gigabyte of
    values, and one at a time where an operation might mix them; a remark says which.

    The report also knows what several weights lose together (`Interactions`): errors of
    neighboring layers often point the same way, and losses of single weights don't add up then.

    Attributes:
        formats: The formats to score.
        int8_activations: Whether the kernel rounds its input to 8 bits.
        sequences: How many sequences of the samples run.
        draws: Losses per sequence; None means as many as make 112 with all sequences, at most 8.
        seed: Of the draws.

    Raises:
        ValueError: `sequences` or `draws` is smaller than 1.

    References:
        [Martens2020], section 5.
    """

    name: ClassVar[str] = "fisher"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    int8_activations: bool = True
    sequences: int = PROBES
    draws: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._draws()

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Run the sequences once for every gigabyte of errors."""
        samples = analyses.need_samples()
        target = loss_target(graph)
        rounded = tuple(f for f in self.formats if f.bits != 32)
        taps, tokens, remark = Taps(), 0, ""
        projections: dict[str, dict[Format, Tensor]] = {}
        rounding: dict[str, dict[Format, float]] = {}
        for sites in groups_in_memory(find_sites(graph), len(rounded)):
            effects = _Effects(graph, sites, rounded, int8_activations=self.int8_activations)
            found = GradientRun(graph, target, sites, [effects, taps])
            self._draws().run(found, target, samples)
            tokens, remark = found.tokens, remark or found.remark
            for site in sites:
                projections[site.weight] = effects.projections(site, tokens)
                rounding[site.weight] = effects.rounding(site, tokens)
        asked = OutputGradients(self.sequences, self.draws, self.seed)
        analyses.supply(asked, taps.report(tokens))
        together = Interactions(projections, rounding)
        losses = {
            name: {f: finite(together.loss({name: f}), name) for f in self.formats}
            for name in projections
        }
        remarks = (remark,) if remark else ()
        return BitScoreReport(
            self.name, losses, target.unit, remarks=remarks, interactions=together
        )

    def _draws(self) -> Draws:
        return Draws(self.sequences, self.draws, self.seed)


def groups_in_memory(sites: Sequence[Site], formats: int) -> Iterator[list[Site]]:
    """Sites whose errors fit into memory together, in order."""
    group: list[Site] = []
    held = 0
    for site in sites:
        nbytes = 4 * site.size * max(formats, 1)
        if group and held + nbytes > _ERROR_BYTES:
            yield group
            group, held = [], 0
        group.append(site)
        held += nbytes
    if group:
        yield group


def rounding_errors(weight: Tensor, formats: tuple[Format, ...]) -> Tensor:
    """``W' - W`` in each format, ``[formats, out, in]``."""
    if not formats:
        return weight[None][:0]
    return torch.stack([dequantized(weight, f) - weight for f in formats])


class _Effects(Watcher):
    """Projects gradients on the errors of some weights: ``<G, D>`` for each loss."""

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
        self._blocks = sorted({f.block for f in formats}) if int8_activations else []
        self._site_of = {reader: site.weight for site in sites for reader in site.readers}
        self._errors = {
            site.weight: rounding_errors(graph.weight(site.node).float(), formats) for site in sites
        }
        self._none = torch.zeros(0, len(formats), dtype=torch.float64)
        self._running = dict.fromkeys(self._errors, self._none)
        self._projections: dict[str, list[list[Tensor]]] = {name: [] for name in self._errors}
        self._rounding = dict.fromkeys(self._errors, self._none.sum(0))
        self._changes: dict[tuple[Node, int], Tensor] = {}

    def start(self, sequences: int) -> None:
        """Nothing is known of the gradients of a batch, and of what its layers read."""
        self._none = self._none.new_zeros(sequences, len(self._formats))
        self._running = dict.fromkeys(self._errors, self._none)
        self._changes.clear()
        for batches in self._projections.values():
            batches.append([])

    def outputs(self, reader: Node, read: Tensor, gradient: Tensor) -> None:
        """Project on the errors of the weight; what several readers give is added."""
        name = self._site_of[reader]
        is_table = reader.target is aten.embedding.default
        projected = _of_table if is_table else _of_matrix
        found = projected(self._errors[name], read, gradient)
        self._running[name] = self._running[name] + found.double()

    def inputs(self, reader: Node, read: Tensor, gradient: Tensor) -> None:
        """Add what rounding the input does, entry by entry."""
        if not self._blocks:
            return
        by_block = {
            block: _squared_sum(gradient * self._change(reader, read, block))
            for block in self._blocks
        }
        added = torch.tensor([by_block[f.block] for f in self._formats], dtype=torch.float64)
        name = self._site_of[reader]
        self._rounding[name] = self._rounding[name] + added

    def finish(self) -> None:
        """The gradients of one loss of each sequence are complete."""
        for name, projected in self._running.items():
            self._projections[name][-1].append(projected)
        self._running = dict.fromkeys(self._errors, self._none)

    def projections(self, site: Site, tokens: int) -> dict[Format, Tensor]:
        """For each format ``[draws]``, with a loss per token as the sum of squares.

        All draws of a sequence stand together, however sequences are batched.
        """
        each = [torch.stack(draws, dim=1).flatten(0, 1) for draws in self._projections[site.weight]]
        found = torch.cat(each) * (0.5 / max(tokens, 1)) ** 0.5
        return dict(zip(self._formats, found.unbind(1), strict=True))

    def rounding(self, site: Site, tokens: int) -> dict[Format, float]:
        """The loss per token of the rounding of inputs, in each format."""
        found = self._rounding[site.weight] * (0.5 / max(tokens, 1))
        return dict(zip(self._formats, found.tolist(), strict=True))

    def _change(self, reader: Node, read: Tensor, block: int) -> Tensor:
        """What rounding does to the input of a layer; several layers may read the same."""
        key = (reader.all_input_nodes[0], block)
        if key not in self._changes:
            self._changes[key] = (round_to_int8(read, block) - read).float()
        return self._changes[key]


def _of_table(errors: Tensor, read: Tensor, gradient: Tensor) -> Tensor:
    """``<G, D>`` for each sequence and each error of an embedding, ``[sequences, formats]``.

    Args:
        errors: ``[formats, rows, out]``.
        read: Indices, ``[sequences, tokens]``.
        gradient: ``[sequences, tokens, out]``.
    """
    found = [(error[read] * gradient).flatten(1).sum(1) for error in errors]
    return torch.stack(found, dim=1) if found else gradient.new_zeros(len(gradient), 0)


def _of_matrix(errors: Tensor, read: Tensor, gradient: Tensor) -> Tensor:
    """The same for a linear layer, whose gradients are made of a few sequences or rows at a time.

    Args:
        errors: ``[formats, out, in]``.
        read: ``[sequences, tokens, in]``.
        gradient: ``[sequences, tokens, out]``.
    """
    _, out, features = errors.shape
    rows = max(1, min(out, _GRADIENT_BYTES // (4 * features)))
    step = max(1, _GRADIENT_BYTES // (4 * rows * features))
    found = gradient.new_zeros(len(gradient), len(errors))
    pieces = zip(read.float().split(step), gradient.split(step), found.split(step), strict=True)
    for x, g, total in pieces:
        x, g = _without_zeros(x, g)
        for own, error in zip(g.split(rows, dim=2), errors.split(rows, dim=1), strict=True):
            total += torch.bmm(own.mT, x).flatten(1) @ error.flatten(1).t()
    return found


def _without_zeros(read: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Without tokens that have no gradient: padding, or all but one that is classified by."""
    # A few channels tell where it is worth while to look at all of them.
    if int((gradient[..., :4] != 0).any(-1).sum(1).max()) > 0.9 * gradient.shape[1]:
        return read, gradient
    seen = (gradient != 0).any(-1)
    places = seen.int().argsort(1, descending=True)[:, : int(seen.sum(1).max()), None]
    return torch.take_along_dim(read, places, 1), torch.take_along_dim(gradient, places, 1)


def _squared_sum(value: Tensor) -> float:
    flat = value.flatten()
    return float(flat @ flat)
