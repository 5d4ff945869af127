"""What rounding a weight costs, measured: one weight in one format at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.ir.graph import Graph
from lamella.ir.operators import round_to_int8
from lamella.ir.quantize import Format, dequantized
from lamella.ir.segments import Calls, Program, Segment, Values, program
from lamella.passes.base import Analyses, Analysis
from lamella.passes.scores.base import BitScore, BitScoreReport, finite
from lamella.passes.scores.target import LossTarget, first_sequences, loss_target
from lamella.passes.sites import Site, find_sites


@dataclass(frozen=True)
class MeasuredKl(BitScore):
    """The measured loss of every weight in every format, all others left as they are.

    Logits are compared by KL divergence, other outputs by ``1 - cos``. Linear layers run with
    the rounding of the kernel that is deployed (`int8_activations`). Each format is measured once
    for a graph, whatever others are asked for with it.

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
        """Measure format by format."""
        found = {
            f: analyses.get(MeasuredFormat(f, self.int8_activations, self.sequences)).losses
            for f in self.formats
        }
        losses = {
            site.weight: {f: found[f][site.weight] for f in self.formats}
            for site in find_sites(graph)
        }
        return BitScoreReport(self.name, losses, loss_target(graph).unit, measured=True)


@dataclass(frozen=True)
class MeasuredFormatReport:
    """What `MeasuredFormat` found.

    Attributes:
        losses: Name of the weight -> loss per token.
    """

    losses: Mapping[str, float]


@dataclass(frozen=True)
class MeasuredFormat(Analysis[MeasuredFormatReport]):
    """The measured loss of every weight in one format, all others left as they are.

    Sites are visited in the order of the stream, and only the blocks from the changed one on run
    again: half a forward run of the samples for each site.

    Attributes:
        format: The format.
        int8_activations: Whether the kernel rounds its input to 8 bits.
        sequences: How many sequences of the samples run.
    """

    name: ClassVar[str] = "measured-format"

    format: Format = field(default_factory=Format)
    int8_activations: bool = True
    sequences: int = 8

    def run(self, graph: Graph, analyses: Analyses) -> MeasuredFormatReport:
        """Measure site by site."""
        samples = first_sequences(analyses.need_samples(), self.sequences)
        sites = find_sites(graph)
        losses = {site.weight: 0.0 for site in sites}
        if self.format.bits == 32:
            return MeasuredFormatReport(losses)
        target = loss_target(graph)
        kept = [target.node] if target.mask is None else [target.node, target.mask]
        running = program(graph, kept)
        trial = _Trial(running, target, [running.start(sample) for sample in samples])
        for place, segment in enumerate(running.segments):
            inside = set(segment.nodes)
            for site in (site for site in sites if site.readers[0] in inside):
                value = dequantized(graph.weight(site.node), self.format)
                calls = _rounding(site, self.format) if self.int8_activations else {}
                loss = trial.loss(place, site.node, value, calls)
                losses[site.weight] = finite(loss, site.weight)
            trial.advance(place)
        return MeasuredFormatReport(losses)


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

    return dict.fromkeys(site.linears, linear)
