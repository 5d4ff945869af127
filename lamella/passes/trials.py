"""The measured loss of bit plans: weights rounded on the fly, the model left as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.ir.operators import round_to_int8
from lamella.ir.ops import aten
from lamella.ir.quantize import Format, Quantized, quantize
from lamella.ir.segments import Calls, Segment, Values, program
from lamella.passes.scores.base import finite
from lamella.passes.scores.target import loss_target
from lamella.passes.sites import Site, find_sites

Formats = Mapping[str, Format]


class Trials:
    """Runs a model as a plan would make it, and compares it with the model as it is.

    Linear layers run with the rounding of activations of the kernel that is deployed. A weight
    is rounded once for each format and kept in codes; one segment of the model is dequantized
    at a time.

    Attributes:
        unit: Of the losses.
    """

    def __init__(self, graph: Graph, samples: Samples, *, int8_activations: bool = True) -> None:
        """Run the model as it is on the samples.

        Raises:
            GraphError: No output can be compared.
            SamplesError: A sample doesn't fit.
        """
        self._target = loss_target(graph)
        mask = self._target.mask
        self._running = program(graph, [self._target.node, *([] if mask is None else [mask])])
        self._graph = graph
        self._sites = {site.weight: site for site in find_sites(graph)}
        self._rounds_inputs = int8_activations
        self._codes: dict[tuple[str, Format], Quantized] = {}
        self._samples = samples
        self._reference = [self._outputs(0, dict(one), {}) for one in self._starts()]
        self.unit = self._target.unit

    def loss(self, plan: Formats) -> float:
        """The mean loss per token of a plan.

        Args:
            plan: Name of the weight -> format; others stay as they are.

        Raises:
            ValueError: The loss is NaN or infinite.
        """
        return self._loss(0, self._starts(), plan)

    def losses_around(self, plan: Formats, changes: Sequence[Formats]) -> list[float]:
        """The loss of a plan with each change made to it, one change at a time.

        What stands before a change runs once for all of them.

        Args:
            plan: As for `loss`.
            changes: Formats that take the place of those of the plan.

        Returns:
            In the order of `changes`.
        """
        first = [self._first_segment(change) for change in changes]
        found = [0.0] * len(changes)
        states = self._starts()
        for place, segment in enumerate(self._running.segments):
            for index in (i for i, where in enumerate(first) if where == place):
                found[index] = self._loss(place, states, {**plan, **changes[index]})
            weights, calls = self._weights(segment, plan), self._calls(plan)
            for values in states:
                segment.run(values, weights, calls=calls)
        return found

    def _starts(self) -> list[Values]:
        return [self._running.start(sample) for sample in self._samples]

    def _loss(self, place: int, states: Sequence[Values], plan: Formats) -> float:
        total, tokens = 0.0, 0
        for values, reference in zip(states, self._reference, strict=True):
            output = self._outputs(place, dict(values), plan)
            total += self._target.loss(reference, output)
            tokens += reference.shape[0]
        return finite(total / max(tokens, 1), "a bit plan")

    def _outputs(self, place: int, values: Values, plan: Formats) -> Tensor:
        """The rows of the target, from the segment at `place` on."""
        calls = self._calls(plan)
        for segment in self._running.segments[place:]:
            segment.run(values, self._weights(segment, plan), calls=calls)
        return self._target.rows(values)

    def _weights(self, segment: Segment, plan: Formats) -> dict[Node, Tensor]:
        return {node: self._weight(node, plan) for node in segment.weights}

    def _weight(self, node: Node, plan: Formats) -> Tensor:
        name = str(node.target)
        format = plan.get(name)
        value = self._graph.weight(node)
        if format is None or format.bits == 32 or name not in self._sites:
            return value
        key = (name, format)
        if key not in self._codes:
            self._codes[key] = quantize(value, format)
        return self._codes[key].dequantized().to(value.dtype)

    def _calls(self, plan: Formats) -> Calls:
        """Linear layers that round their input as a kernel with 8-bit activations does."""
        if not self._rounds_inputs:
            return {}
        calls: dict[Node, Any] = {}
        for name, format in plan.items():
            if format.bits != 32 and name in self._sites:
                calls |= dict.fromkeys(linears(self._sites[name]), _rounding(format.block))
        return calls

    def _first_segment(self, change: Formats) -> int:
        """Index of the segment from where a change makes a difference."""
        readers = {
            reader for name in change if name in self._sites for reader in self._sites[name].readers
        }
        places = (
            place
            for place, segment in enumerate(self._running.segments)
            if not readers.isdisjoint(segment.nodes)
        )
        return next(places, len(self._running.segments) - 1)


def linears(site: Site) -> tuple[Node, ...]:
    """The linear layers that read a weight."""
    return tuple(reader for reader in site.readers if reader.target is aten.linear.default)


def _rounding(block: int) -> Any:
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        return functional.linear(round_to_int8(input, block), weight, bias)

    return linear
