"""Rounding the matrices of experts, each for the rows that are routed to it.

No operator of few bits multiplies rows that are sorted by expert. What is rounded stays dense: it
shows what a width would cost, and the bytes of its codes are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from lamella.data import Samples
from lamella.errors import PassError, SamplesError
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.ir.quantize import Format, quantize, weight_bytes
from lamella.ir.segments import Segment, Values, program
from lamella.passes.rounding.base import Rounding
from lamella.passes.rounding.gram import InputGram
from lamella.passes.rounding.steps import part_of

Rows = tuple[Tensor, list[int]]
"""The rows of a layer, ``[rows, in]``, and where those of each expert end."""


@dataclass
class ExpertNotes:
    """What is to be said about experts.

    Attributes:
        weights: The weights that were rounded.
        entries: Of all of them.
        stored_bytes: What a file of their codes would have.
        few: Experts with fewer tokens than inputs, as ``weight[expert]`` -> tokens, inputs.
        nearest: Experts whose Gram matrix has no factor.
    """

    weights: list[str] = field(default_factory=list[str])
    entries: int = 0
    stored_bytes: int = 0
    few: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    nearest: list[str] = field(default_factory=list[str])


def expert_layers(graph: Graph) -> list[Node]:
    """The products of rows that are sorted by expert, whose weight nothing else reads."""
    found = graph.find(lam.grouped_linear.default)
    weights = {layer: graph.operand(layer, "weight") for layer in found}
    return [n for n, w in weights.items() if w.op == "get_attr" and len(w.users) == 1]


def round_experts(
    graph: Graph, samples: Samples, rounding: Rounding, format: Format, notes: ExpertNotes
) -> Iterator[tuple[Node, Tensor]]:
    """Round the experts of one layer after the other, behind those that are rounded already.

    The samples run once, block by block, and the Gram matrix of one expert is in memory. Rows of
    padding count as well: which they are is not known where rows are sorted by expert. An expert
    with fewer tokens than inputs has a singular Gram matrix, which is damped; one without any is
    rounded to nearest.

    Args:
        graph: Its weights may be replaced by what is yielded, and in no other way.
        samples: Calibration inputs.
        rounding: The method.
        format: Of all experts.
        notes: Written into.

    Yields:
        The node of a weight and its rounded value, ``[experts, out, in]``.

    Raises:
        SamplesError: The inputs of an expert hold NaN or infinite entries, or squares overflow.
    """
    layers = set(expert_layers(graph))
    running = program(graph, (), together=[(layer,) for layer in layers])
    states = [running.start(sample) for sample in samples]
    for segment in running.segments:
        weights = segment.read_weights(graph)
        start = 0
        for place, layer in enumerate(segment.nodes):
            if layer not in layers:
                continue
            _advance(part_of(segment, start, place), states, weights)
            node = graph.operand(layer, "weight")
            rows = [_sorted_rows(graph, layer, values) for values in states]
            weights[node] = _rounded(node, weights[node], rows, (rounding, format), notes)
            start = place
            yield node, weights[node]
        _advance(part_of(segment, start, len(segment.nodes)), states, weights)


def experts_to_nearest(
    graph: Graph, format: Format, notes: ExpertNotes
) -> Iterator[tuple[Node, Tensor]]:
    """As `round_experts`, each entry for itself and without samples."""
    for layer in expert_layers(graph):
        node = graph.operand(layer, "weight")
        weight = graph.weight(node)
        _count(str(node.target), weight, format, notes)
        yield node, quantize(weight, format).dequantized().to(weight.dtype)


def _advance(piece: Segment, states: Sequence[Values], weights: Mapping[Node, Tensor]) -> None:
    for values in states:
        piece.run(values, weights)


def _sorted_rows(graph: Graph, layer: Node, values: Values) -> Rows:
    offsets: Tensor = values[graph.operand(layer, "offsets")]
    return values[graph.operand(layer, "input")], [int(stop) for stop in offsets]


def _rounded(
    node: Node,
    weight: Tensor,
    rows: Sequence[Rows],
    how: tuple[Rounding, Format],
    notes: ExpertNotes,
) -> Tensor:
    rounding, format = how
    name = str(node.target)
    _count(name, weight, format, notes)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert, matrix in enumerate(weight.detach().float()):
        inputs = _gram(name, expert, rows)
        label = f"{name}[{expert}]"
        if inputs.tokens < matrix.shape[1]:
            notes.few[label] = (inputs.tokens, int(matrix.shape[1]))
        if not inputs.tokens:
            result[expert] = quantize(matrix, format).dequantized()
            continue
        try:
            found = rounding.round(matrix, format, inputs)
        except ValueError as error:
            raise PassError(f"expert {expert} of {name!r} can't be quantized: {error}") from error
        result[expert] = found.value()
        notes.stored_bytes += 0 if found.exact is None else 4 * found.exact.numel()
        if found.damping == math.inf:
            notes.nearest.append(label)
    return result


def _count(name: str, weight: Tensor, format: Format, notes: ExpertNotes) -> None:
    notes.weights.append(name)
    notes.entries += weight.numel()
    notes.stored_bytes += weight_bytes(weight.shape, format)


def _gram(name: str, expert: int, rows: Sequence[Rows]) -> InputGram:
    """Of the rows that are routed to one expert."""
    width = rows[0][0].shape[-1]
    total, count = torch.zeros(width, width), 0
    for value, stops in rows:
        own = value[(stops[expert - 1] if expert else 0) : stops[expert]].float()
        total.addmm_(own.t(), own)
        count += len(own)
    if not bool(torch.isfinite(total).all()):
        raise SamplesError(
            f"the inputs of expert {expert} of {name} hold entries that are NaN or infinite, or "
            f"whose squares overflow; look for inputs or weights that overflow"
        )
    return InputGram(total.div_(max(count, 1)), count)
