"""Let convolutions multiply 8-bit integers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.data import Samples
from lamella.errors import PassError, closest
from lamella.ir.graph import Graph
from lamella.ir.integer_operators import static_range
from lamella.ir.ops import aten, lam
from lamella.ir.quantize import Integers, integers
from lamella.ir.reducers import Extremes
from lamella.ir.runner import Request
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.relevance.folding import fold_batch_norms
from lamella.passes.rounding.chain import ChainNotes
from lamella.passes.rounding.gptq import Gptq
from lamella.passes.rounding.gram import InputGram
from lamella.passes.rounding.grid import Grid
from lamella.passes.rounding.patches import axis_values, patch_grams
from lamella.passes.rounding.quantease import QuantEase
from lamella.passes.rounding.report import tell

_METHODS = ("rtn", "gptq", "quantease")
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)
Ranges = Mapping[Node, tuple[float, int]]
"""A value -> the step and the zero of its codes."""


@dataclass(frozen=True)
class QuantizeConvolutions(Transform):
    """Round weights, inputs and outputs of convolutions to 8 bits.

    A convolution becomes `lamella::conv_int8`: weights have a scale for each output, and the
    ranges of inputs and outputs are the extremes over the samples, from the float model. Batch
    norms are folded into the convolutions before them first, and a rectifier that is the only
    reader of a convolution becomes the lower end of its range.

    Convolutions with groups stay: with one channel a group (depthwise), kernels of integers take
    longer than those of floats. So do transposed convolutions, and weights that something else
    reads too.

    Attributes:
        method: How weights are rounded: ``"rtn"`` to nearest; ``"gptq"`` and ``"quantease"`` for
            the patches that the samples show, as in `quantize-weights`.
        min_size: Weights with fewer entries stay as they are.
        first: Whether the convolutions that read an input of the model take part. They see the
            raw data, and gain least where they have few channels.

    Raises:
        ValueError: `method` is another one, or `min_size` is negative.

    References:
        [Jacob2018], for integer arithmetic with static ranges; [Frantar2023] and [Behdin2023] for
        methods.
    """

    name: ClassVar[str] = "quantize-convolutions"
    effect: ClassVar[Effect] = Effect.LOSSY

    method: str = "rtn"
    min_size: int = 1 << 8
    first: bool = True

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(
                f"method must be one of {', '.join(_METHODS)}, got {self.method!r}"
                f"{closest(self.method, _METHODS)}"
            )
        if self.min_size < 0:
            raise ValueError(f"min_size must not be negative, got {self.min_size}")

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Measure ranges, then replace convolution by convolution."""
        layers = graph.find(*_CONVOLUTIONS)
        if not layers:
            analyses.remark("there are no convolutions to quantize")
            return
        samples = analyses.need_samples()
        fold_batch_norms(graph)
        kept: dict[str, list[str]] = {}
        chosen: dict[Node, Node] = {}
        for layer in graph.find(*_CONVOLUTIONS):
            reason = self._refusal(graph, layer)
            if reason:
                kept.setdefault(reason, []).append(_weight_name(graph, layer))
            else:
                chosen[layer] = _end(layer)
        for reason, names in kept.items():
            analyses.note(f"convolutions left as they are ({reason}): {', '.join(names)}")
        if not chosen:
            analyses.remark("no convolution was quantized: lower min_size")
            return
        ranges = _ranges(graph, analyses, chosen)
        stored = self._stored(graph, analyses, samples, chosen)
        known = {value.name: found for value, found in ranges.items()}
        for layer, end in chosen.items():
            source = graph.operand(layer, "input")
            made = _replace(graph, layer, end, stored[layer], (known[source.name], known[end.name]))
            known[made.name] = known[end.name]

    def _stored(
        self, graph: Graph, analyses: Analyses, samples: Samples, layers: Iterable[Node]
    ) -> Mapping[Node, Integers]:
        """The codes of all weights."""
        if self.method == "rtn":
            return {layer: _nearest(graph, layer) for layer in layers}
        rounding = Gptq() if self.method == "gptq" else QuantEase()
        stored: dict[Node, Integers] = {}
        notes = ChainNotes()
        for layer, inputs in patch_grams(graph, samples, layers):
            name, weight = _weight_name(graph, layer), _matrix(graph, layer)
            found = rounding.on_grid(weight, _rows_grid(name, weight, inputs), inputs)
            stored[layer] = (
                _nearest(graph, layer) if found is None else found.grid.store_rows(found.values)
            )
            notes.see(name, weight.shape[1], inputs, math.inf if found is None else found.damping)
        tell(notes, analyses, Gptq().damping)
        return stored

    def _refusal(self, graph: Graph, layer: Node) -> str:
        """Why a convolution stays, or nothing."""
        weight, bias = graph.operand(layer, "weight"), graph.operand(layer, "bias")
        groups = int(graph.operand(layer, "groups"))
        if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
            return "the weight or the bias is computed"
        if len(weight.users) > 1:
            return "something else reads the weight"
        if groups > 1:
            alone = groups == int(graph.operand(layer, "input").meta["val"].shape[1])
            return "depthwise, floats are faster" if alone else "groups"
        if weight.meta["val"].dtype is not torch.float32:
            return f"of {str(weight.meta['val'].dtype).removeprefix('torch.')}"
        if layer.meta["val"].ndim != weight.meta["val"].ndim:
            return "without a batch"
        if weight.meta["val"].numel() < self.min_size:
            return f"fewer than {self.min_size} entries"
        is_first = graph.operand(layer, "input").op == "placeholder"
        return "reads an input of the model" if is_first and not self.first else ""


def _end(layer: Node) -> Node:
    """The convolution itself, or the rectifier that is all that reads it."""
    users = list(layer.users)
    return users[0] if len(users) == 1 and users[0].target is aten.relu.default else layer


def _ranges(graph: Graph, analyses: Analyses, chosen: Mapping[Node, Node]) -> Ranges:
    """Steps and zeros of the values that the convolutions read and of those that they make."""
    sources = [graph.operand(layer, "input") for layer in chosen]
    values = dict.fromkeys([*sources, *chosen.values()])
    requests = {value: Request.of(Extremes(), value, channel_axis=1) for value in values}
    found = analyses.statistics(requests.values())
    ranges: dict[Node, tuple[float, int]] = {}
    for value, request in requests.items():
        low, high = (float(end) for end in found[request])
        try:
            ranges[value] = static_range(low, high)
        except ValueError as error:
            raise PassError(
                f"the samples give node {value.name} values that have no range: {error}"
            ) from error
    return ranges


def _replace(
    graph: Graph,
    layer: Node,
    end: Node,
    stored: Integers,
    ranges: tuple[tuple[float, int], tuple[float, int]],
) -> Node:
    """Put the product of integers in the place of a convolution and its rectifier."""
    name, shape = _weight_name(graph, layer), graph.operand(layer, "weight").meta["val"].shape
    axes = len(shape) - 2
    args = (
        graph.operand(layer, "input"),
        graph.add_weight(f"{name}_codes", stored.codes.reshape(shape)),
        graph.add_weight(f"{name}_scales", stored.scales),
        graph.operand(layer, "bias"),
        *(
            axis_values(graph.operand(layer, key), axes)
            for key in ("stride", "padding", "dilation")
        ),
        1,
        *ranges[0],
        *ranges[1],
    )
    made = graph.call(lam.conv_int8.default, *args, before=end)
    graph.replace(end, made)
    graph.erase([end] if end is layer else [end, layer])
    return made


def _matrix(graph: Graph, layer: Node) -> Tensor:
    """The weight as ``[out, in * kernel]``."""
    return graph.weight(graph.operand(layer, "weight")).detach().flatten(1)


def _nearest(graph: Graph, layer: Node) -> Integers:
    with _named(_weight_name(graph, layer)):
        return integers(_matrix(graph, layer))


def _rows_grid(name: str, weight: Tensor, inputs: InputGram) -> Grid:
    with _named(name):
        return Grid.of_rows(weight, inputs.diagonal)


@contextlib.contextmanager
def _named(name: str) -> Generator[None]:
    """Say which weight can't be quantized."""
    try:
        yield
    except ValueError as error:
        raise PassError(f"weight {name!r} can't be quantized: {error}") from error


def _weight_name(graph: Graph, layer: Node) -> str:
    weight = graph.operand(layer, "weight")
    return str(weight.target) if weight.op == "get_attr" else layer.name
