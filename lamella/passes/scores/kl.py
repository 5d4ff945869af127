"""What rounding a weight costs, measured: one weight in one format at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.ir.graph import Graph
from lamella.ir.operators import round_to_int8
from lamella.ir.ops import aten
from lamella.ir.quantize import Format, dequantized
from lamella.ir.segments import Calls, Program, Segment, Values, program
from lamella.passes.base import Analyses
from lamella.passes.scores.base import BitScore, BitScoreReport, finite
from lamella.passes.scores.target import LossTarget, first_sequences, loss_target
from lamella.passes.sites import Site, find_sites


@dataclass(frozen=True)
class MeasuredKl(BitScore):
    """The measured loss of every weight in every format, all others left as they are.

    Logits are compared by KL divergence, other outputs by ``1 - cos``. Linear layers run with
    the rounding of the kernel that is deployed (`int8_activations`). Sites are visited in the
    order of the stream, and only the blocks from the changed one on run again. It costs (sites
    x formats) / 2 forward runs of the samples.

    Attributes:
        formats: The formats to score.
        int8_activations: Whether the kernel rounds its input to 8 bits.
        sequences: How many sequences of the samples run.
    """

    name: ClassVar[str] = "kl"
    needs_samples: ClassVar[bool] = True

    formats: tuple[Format, ...] = ()
    int8_activations: bool = True
    sequences: int = 8

    def run(self, graph: Graph, analyses: Analyses) -> BitScoreReport:
        """Measure site by site."""
        samples = first_sequences(analyses.need_samples(), self.sequences)
        target = loss_target(graph)
        kept = [target.node] if target.mask is None else [target.node, target.mask]
        running = program(graph, kept)
        trial = _Trial(running, target, [running.start(sample) for sample in samples])
        losses: dict[str, dict[Format, float]] = {}
        sites = find_sites(graph)
        for place, segment in enumerate(running.segments):
            inside = set(segment.nodes)
            for site in (site for site in sites if site.readers[0] in inside):
                losses[site.weight] = self._measure(graph, trial, site, place)
            trial.advance(place)
        unread = {site.weight: dict.fromkeys(self.formats, 0.0) for site in sites}
        return BitScoreReport(self.name, unread | losses, target.unit, measured=True)

    def _measure(self, graph: Graph, trial: _Trial, site: Site, place: int) -> dict[Format, float]:
        weight = graph.weight(site.node)
        measured: dict[Format, float] = {}
        for f in self.formats:
            if f.bits == 32:
                measured[f] = 0.0
                continue
            calls = _rounding(site, f) if self.int8_activations else {}
            loss = trial.loss(place, site.node, dequantized(weight, f), calls)
            measured[f] = finite(loss, site.weight)
        return measured


class _Trial:
    """The samples, stopped at the start of a segment, from where changes are tried."""

    def __init__(self, running: Program, target: LossTarget, states: Sequence[Values]) -> None:
        self._running = running
        self._target = target
        self._states = states
        self._reference = [self._outputs(0, values, None, {}) for values in states]

    def loss(self, place: int, node: Node, value: Tensor, calls: Calls) -> float:
        """The mean loss per token when `value` stands for the weight that `node` reads."""
        total, tokens = 0.0, 0
        for values, reference in zip(self._states, self._reference, strict=True):
            output = self._outputs(place, values, (node, value), calls)
            total += self._target.loss(reference, output)
            tokens += reference.shape[0]
        return total / tokens

    def advance(self, place: int) -> None:
        """Run one segment as it is."""
        segment = self._running.segments[place]
        weights = segment.read_weights(self._running.graph)
        for values in self._states:
            segment.run(values, weights)

    def _outputs(
        self, place: int, values: Values, change: tuple[Node, Tensor] | None, calls: Calls
    ) -> Tensor:
        """The rows of the target, from the segment at `place` on; `values` stays as it is."""
        running = dict(values)
        for segment in self._running.segments[place:]:
            segment.run(running, self._weights(segment, change), calls=calls)
        return self._target.rows(running)

    def _weights(self, segment: Segment, change: tuple[Node, Tensor] | None) -> dict[Node, Tensor]:
        if change is None or change[0] not in segment.weights:
            return segment.read_weights(self._running.graph)
        node, value = change
        others = (other for other in segment.weights if other is not node)
        return {node: value} | {other: self._running.graph.weight(other) for other in others}


def _rounding(site: Site, format: Format) -> Calls:
    """Linear layers that round their input as a kernel with 8-bit activations does."""

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        return functional.linear(round_to_int8(input, format.block), weight, bias)

    return {reader: linear for reader in site.readers if reader.target is aten.linear.default}
