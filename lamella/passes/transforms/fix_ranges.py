"""Give products of integers the ranges that their inputs have over the samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lamella.errors import PassError
from lamella.ir.graph import Graph
from lamella.ir.integer_operators import static_range
from lamella.ir.ops import lam
from lamella.ir.reducers import Extremes
from lamella.ir.runner import Request
from lamella.passes.base import Analyses, Effect, Transform


@dataclass(frozen=True)
class FixRanges(Transform):
    """Round the inputs of integer layers with ranges from the samples, not from each input.

    A layer that ``quantize-weights activations=int8-tensor`` made finds the range of its input in
    every call. Here the range becomes a constant (`lamella::linear_int8_static`): the extremes
    over the samples, of the model as it is now. That saves a pass over the input, and the result
    for a token no longer depends on what is beside it; what lies outside of the range is cut off.
    Layers with a scale for each row stay: no constant is as exact.

    Raises:
        PassError: The samples give a layer values that have no range.

    References:
        [Jacob2018], for static ranges.
    """

    name: ClassVar[str] = "fix-ranges"
    effect: ClassVar[Effect] = Effect.LOSSY

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Measure all inputs at once, then replace layer by layer."""
        found = graph.find(lam.linear_int8.default)
        layers = [layer for layer in found if not graph.operand(layer, "per_row")]
        if len(layers) < len(found):
            count = len(found) - len(layers)
            analyses.note(f"{count} layers have a scale for each row and stay as they are")
        if not layers:
            analyses.remark(
                "no layer has one range for its input: run quantize-weights "
                "activations=int8-tensor before"
            )
            return
        requests = {
            layer: Request.of(Extremes(), graph.operand(layer, "input")) for layer in layers
        }
        known = analyses.statistics(requests.values())
        ranges = {layer: tuple(float(end) for end in known[requests[layer]]) for layer in layers}
        for layer, (low, high) in ranges.items():
            try:
                step, zero = static_range(low, high)
            except ValueError as error:
                raise PassError(
                    f"the samples give the input of node {layer.name} values that have no range: "
                    f"{error}"
                ) from error
            names = ("input", "weight", "scales", "bias")
            args = (*(graph.operand(layer, name) for name in names), step, zero)
            target = lam.linear_int8_static.default
            graph.replace(layer, graph.call(target, *args, before=layer))
        graph.erase(layers)
        analyses.note(f"{len(layers)} layers have the ranges of the samples")
