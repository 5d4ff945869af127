"""Round activations and weights of linear layers and attention to few bits, as an emulation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import PassError
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.runner import Request, sweep_requests
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.scale_places import Place, find_places
from lamella.passes.sites import FOLDED, Site, find_sites
from lamella.passes.transforms.activation_ranges import (
    Range,
    Reparameterized,
    RowSample,
    channel_ranges,
    log_scale,
    range_of,
    reparameterized,
    rounded,
)
from lamella.passes.transforms.open_attention import Opened, closed_because, open_attention

SOFTMAX = ("log-sqrt2", "uniform", "none")
"""How probabilities of attention may be rounded."""

_AS_IT_IS = 32


@dataclass(frozen=True)
class QuantizeActivations(Transform):
    """Round inputs and weights of linear layers, and both products of attention, to few bits.

    *An emulation*: the values are rounded to those of so many codes and stay floating point
    (`lamella::round_uniform`, `lamella::round_log`). No kernel runs such a graph faster; it tells
    what a format does to a model, on every backend.

    - Linear layers: the input has one asymmetric range (scale and zero) for all channels, the
      weight one for each output. Width by width as the plan of the graph says, or `bits`.
    - Behind a layer_norm that only linear layers read, ranges of the channels are made one by
      *reparameterizing*: scale and bias of the norm, weight and bias of the layers change so
      that the function stays and one range fits all channels (RepQ-ViT). `clip` moves outliers
      among the ranges to a percentile first (LRP-QViT, which does not publish which).
    - Attention is written out; queries, keys and values have one range each, probabilities go to
      powers of the root of two, whose codes are fine where nearly all probabilities are.

    Ranges are those of least squared error on some rows of the samples, where the papers try a
    few percentiles. Convolutions and embeddings stay as they are.

    On a small vision transformer of digits with all at 4 bits, probabilities on powers lose a tenth
    of what evenly spaced ones lose (KL 0.064 against 0.63); at 6 bits they lose as much (0.014
    and 0.012), since their error stays in proportion to the value. Its norms have no outliers:
    there reparameterizing and `clip` gain nothing.

    Attributes:
        bits: Width of inputs and weights of linear layers, 2 to 16; None follows the plan of
            `allocate-bits`, whose blocks don't matter here. A value that several layers read has
            the largest of their widths.
        attention_bits: Width of queries, keys, values and probabilities; 32 leaves attention.
        softmax: ``"log-sqrt2"``, ``"uniform"``, or ``"none"`` for probabilities as they are.
        reparameterize: Whether norms take part; otherwise their outputs have one plain range.
        clip: Percentile of scales and zeros of channels that is cut off at both ends, in [0, 50).
        weights: Whether weights are rounded too.
        rows: How many rows of a value the ranges are found from.

    Raises:
        ValueError: An option has another value.

    References:
        [Li2023], sections 3.2 and 3.3; [Ranjan2024].
    """

    name: ClassVar[str] = "quantize-activations"
    effect: ClassVar[Effect] = Effect.LOSSY

    bits: int | None = None
    attention_bits: int = 8
    softmax: str = "log-sqrt2"
    reparameterize: bool = True
    clip: float = 0.0
    weights: bool = True
    rows: int = 1024

    def __post_init__(self) -> None:
        widths = (*range(2, 17), _AS_IT_IS)
        if self.bits is not None and self.bits not in widths[:-1]:
            raise ValueError(f"bits must be 2 to 16, or none for the plan, got {self.bits}")
        if self.attention_bits not in widths:
            raise ValueError(
                f"attention_bits must be 2 to 16, or 32 to leave attention, got "
                f"{self.attention_bits}"
            )
        if self.softmax not in SOFTMAX:
            raise ValueError(f"softmax must be one of {', '.join(SOFTMAX)}, got {self.softmax!r}")
        if not 0.0 <= self.clip < 50.0:
            raise ValueError(f"clip must be in [0, 50), got {self.clip}")
        if self.rows < 2:
            raise ValueError(f"rows must be at least 2, got {self.rows}")

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Write attention out, look at the values, then edit."""
        analyses.need_samples()
        widths = self._widths(graph)
        opened = self._open(graph, analyses)
        norms = _norms(graph, widths) if self.reparameterize else {}
        found = self._ranges(graph, analyses, (widths, norms, opened))
        for norm, change in found.norms.items():
            _change_norm(graph, norms[norm], change)
        rounds = _Rounds(graph)
        inputs: dict[Node, list[Node]] = {}
        for layer in widths:
            inputs.setdefault(graph.operand(layer, "input"), []).append(layer)
        for value, layers in inputs.items():
            rounds.uniform(value, found.uniform[value], max(widths[one] for one in layers), layers)
        for one in opened:
            self._round_attention(rounds, one, found)
        changed = self._round_weights(graph, widths)
        graph.plan = {k: v for k, v in graph.plan.items() if k not in changed}
        analyses.note(
            f"emulated, no kernel runs this: {rounds.count} values and {len(changed)} weights are "
            f"rounded, {len(found.norms)} norms reparameterized"
        )

    # ---- what gets which width --------------------------------------------------------------

    def _widths(self, graph: Graph) -> dict[Node, int]:
        """Linear layer -> width, for those that are rounded."""
        if self.bits is None and not graph.plan:
            raise PassError(
                "quantize-activations has no plan to follow; run allocate-bits before it, or "
                "give bits="
            )
        widths: dict[Node, int] = {}
        for site in find_sites(graph):
            planned = graph.plan.get(site.weight)
            bits = self.bits or (planned.bits if planned else _AS_IT_IS)
            widths |= dict.fromkeys(_layers(site), bits) if bits != _AS_IT_IS else {}
        if not widths:
            raise PassError("no linear layer gets fewer bits: there is none, or the plan has none")
        return widths

    def _open(self, graph: Graph, analyses: Analyses) -> list[Opened]:
        if self.attention_bits == _AS_IT_IS:
            return []
        nodes = graph.find(aten.scaled_dot_product_attention.default)
        reasons = {node: closed_because(graph, node) for node in nodes}
        closed = [f"{node.name} ({reason})" for node, reason in reasons.items() if reason]
        if closed:
            analyses.remark(f"left {len(closed)} attentions as they are: {', '.join(closed)}")
        return [open_attention(graph, node) for node, reason in reasons.items() if not reason]

    # ---- looking ----------------------------------------------------------------------------

    def _ranges(
        self,
        graph: Graph,
        analyses: Analyses,
        wanted: tuple[Mapping[Node, int], Mapping[Node, Place], list[Opened]],
    ) -> _Found:
        """Ranges of all values, each from its rows, which are forgotten afterwards."""
        widths, norms, opened = wanted
        bits: dict[Node, int] = {}
        for layer, width in widths.items():
            value = graph.operand(layer, "input")
            bits[value] = max(width, bits.get(value, 0))
        bits |= {n: self.attention_bits for o in opened for n in (o.query, o.key, o.value)}
        bits |= {norm: max(widths[r.layer] for r in p.readers) for norm, p in norms.items()}
        rows = RowSample(self.rows)
        requests = {Request.of(rows, node): node for node in bits}
        entries = RowSample(self.rows * 16, flat=True)
        logs = {Request.of(entries, o.probabilities): o.probabilities for o in opened}
        found = _Found()
        samples = analyses.need_samples()
        everything = [*requests, *logs]
        for finished in sweep_requests(graph, samples, everything, progress=analyses.progress):
            for request, sample in finished.items():
                if request in logs:
                    self._look_at_probabilities(found, logs[request], sample)
                elif requests[request] in norms:
                    node = requests[request]
                    own = channel_ranges(sample, bits[node], whole=False)
                    found.norms[node] = reparameterized(own, self.clip)
                else:
                    found.uniform[requests[request]] = range_of(sample, bits[requests[request]])
        for norm, place in norms.items():
            of_norm = dict.fromkeys((r.value for r in place.readers), found.norms[norm].range)
            found.uniform |= of_norm
        return found

    def _look_at_probabilities(self, found: _Found, node: Node, sample: Tensor) -> None:
        if self.softmax == "log-sqrt2":
            found.logs[node] = log_scale(sample, self.attention_bits)
        elif self.softmax == "uniform":
            found.uniform[node] = range_of(sample, self.attention_bits)

    # ---- editing ----------------------------------------------------------------------------

    def _round_attention(self, rounds: _Rounds, one: Opened, found: _Found) -> None:
        for value, reader in (
            (one.query, one.scores),
            (one.key, one.transposed),
            (one.value, one.output),
        ):
            rounds.uniform(value, found.uniform[value], self.attention_bits, [reader])
        node = one.probabilities
        if node in found.logs:
            rounds.log(node, found.logs[node], self.attention_bits, one.output)
        elif node in found.uniform:
            rounds.uniform(node, found.uniform[node], self.attention_bits, [one.output])

    def _round_weights(self, graph: Graph, widths: Mapping[Node, int]) -> set[str]:
        """Put every weight on the grid of its width, a range per output; their names."""
        changed: set[str] = set()
        for site in find_sites(graph) if self.weights else ():
            bits = {widths[layer] for layer in _layers(site) if layer in widths}
            if bits:
                columns = graph.weight(site.node).float().t()
                value = rounded(columns, channel_ranges(columns, max(bits)), max(bits)).t()
                graph.set_weight(site.node, value.to(site.dtype).contiguous())
                site.node.meta[FOLDED] = self.name
                changed.add(site.weight)
        return changed


@dataclass
class _Found:
    """What the samples say.

    Attributes:
        uniform: Value -> its range.
        logs: Probabilities -> the largest that is told apart.
        norms: Norm -> how its channels get one range.
    """

    uniform: dict[Node, Range] = field(default_factory=dict)
    logs: dict[Node, Tensor] = field(default_factory=dict)
    norms: dict[Node, Reparameterized] = field(default_factory=dict)


class _Rounds:
    """Puts rounding between values and some of their readers."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.count = 0

    def uniform(self, value: Node, range: Range, bits: int, readers: Iterable[Node]) -> None:
        names = {"scale": range.scale, "zero": range.zero}
        operands = [self._constant(value, name, one) for name, one in names.items()]
        self._between(value, readers, lam.round_uniform.default, *operands, bits)

    def log(self, value: Node, scale: Tensor, bits: int, reader: Node) -> None:
        constant = self._constant(value, "scale", scale)
        self._between(value, [reader], lam.round_log.default, constant, bits)

    def _constant(self, value: Node, name: str, data: Tensor) -> Node:
        data = data.to(value.meta["val"].dtype)
        return self.graph.add_weight(f"rounding_{self.count}.{name}", data)

    def _between(self, value: Node, readers: Iterable[Node], target: object, *rest: object) -> None:
        new = self.graph.call(target, value, *rest, after=value, like=value)  # pyright: ignore[reportArgumentType]
        for reader in readers:
            self.graph.reread(reader, value, new)
        self.count += 1


def _layers(site: Site) -> list[Node]:
    return [r for r in site.readers if r.target is aten.linear.default]


def _norms(graph: Graph, widths: Mapping[Node, int]) -> dict[Node, Place]:
    """The layer norms whose readers can all make up for a change of scale and shift."""
    found: dict[Node, Place] = {}
    for place in find_places(graph)[0]:
        layers = [reader.layer for reader in place.readers]
        if (
            place.producer.target is aten.layer_norm.default
            and bool(place.free.all())
            and all(layer in widths for layer in layers)
            and all(torch.equal(r.channels, torch.arange(len(place.free))) for r in place.readers)
        ):
            found[place.producer] = place
    return found


def _change_norm(graph: Graph, place: Place, change: Reparameterized) -> None:
    """``g / r``, ``b / r - d`` in the norm; ``W diag(r)``, ``c + W diag(r) d`` in the layers."""
    norm, ratio, shift = place.producer, change.ratio, change.shift
    plain = {"weight": torch.ones(len(ratio)), "bias": torch.zeros(len(ratio))}
    for name, missing in plain.items():
        node = graph.operand(norm, name)
        old = missing if node is None else graph.weight(node)
        new = old.double() / ratio - (shift if name == "bias" else 0.0)
        _give(graph, norm, name, new.to(norm.meta["val"].dtype))
    for reader in place.readers:
        weight = graph.operand(reader.layer, "weight")
        turned = graph.weight(weight).double() * ratio
        bias = graph.operand(reader.layer, "bias")
        added = turned @ shift
        added = added if bias is None else added + graph.weight(bias).double()
        _give(graph, reader.layer, "bias", added.to(graph.weight(weight).dtype))
    for weight in dict.fromkeys(graph.operand(r.layer, "weight") for r in place.readers):
        value = graph.weight(weight)
        graph.set_weight(weight, (value.double() * ratio).to(value.dtype))
        weight.meta[FOLDED] = QuantizeActivations.name


def _give(graph: Graph, node: Node, name: str, value: Tensor) -> None:
    """A new value of a parameter that only `node` reads, or a new parameter."""
    old = graph.operand(node, name)
    if old is not None and list(old.users) == [node]:
        graph.set_weight(old, value)
        old.meta[FOLDED] = QuantizeActivations.name
    else:
        graph.set_operand(node, name, graph.add_weight(f"{node.name}.own_{name}", value))
