"""What linear layers lose in products of 8-bit integers: of the weight and of the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.errors import closest
from lamella.ir.graph import Graph
from lamella.ir.integer_operators import linear_int8_static, static_range
from lamella.ir.operators import linear_int8
from lamella.ir.quantize import Integers, integers
from lamella.ir.reducers import Extremes
from lamella.ir.runner import Request
from lamella.passes.base import Analyses, Analysis
from lamella.passes.scores.base import finite
from lamella.passes.scores.gradients import GradientRun, Watcher
from lamella.passes.scores.output_gradients import PROBES, Draws
from lamella.passes.scores.target import loss_target
from lamella.passes.sites import Site, find_sites

Numerics = Literal["int8-rows", "int8-tensor", "int8-static"]
"""How an input is rounded: a scale for each row, for each input, or from the samples."""

Emulator = Callable[[Tensor], Tensor]
"""What a kernel computes of an input ``[tokens, in]``, without its bias."""


@dataclass(frozen=True)
class IntegerProductsReport:
    """What every weight of linear layers loses as integers; lower is better.

    Attributes:
        losses: Name of the weight -> how inputs are rounded -> loss, of the weight and of the
            input together.
        unit: ``"KL per token"`` or ``"cosine distance per token"``.
    """

    losses: Mapping[str, Mapping[str, float]]
    unit: str

    def order(self, numerics: Numerics) -> tuple[str, ...]:
        """The weights, the one that loses least first."""
        return tuple(sorted(self.losses, key=lambda name: self.losses[name][numerics]))


@dataclass(frozen=True)
class IntegerProducts(Analysis[IntegerProductsReport]):
    """The expected loss of running a linear layer in 8-bit integers, inputs included.

    ``1/2 E[<g, y' - y>^2]``: g is the gradient at what the layer computes (see `drawn_loss`), y'
    what the kernel computes with its weight and its input rounded, by the emulator of its format
    (`lamella::linear_int8`, `lamella::linear_int8_static`). Errors of all tokens of a sequence are
    added before they are squared: one scale for a whole input moves small entries to zero, which
    is no noise that averages out. Blocks of few bits have scores of their own (`fisher`), which
    round inputs as their kernels do.

    It costs a forward run of each sequence, for each draw a backward run, and for each way to
    round inputs a product per layer. Static ranges are the extremes of the samples, as
    `fix-ranges` has them, and sequences are seen one at a time, as the range of a whole input
    depends on what is beside it.

    Attributes:
        numerics: Ways to round inputs, among ``int8-rows``, ``int8-tensor`` and ``int8-static``.
        sequences: How many sequences of the samples run.
        draws: Losses per sequence; None means as many as make 112 with all sequences, at most 8.
        seed: Of the draws.

    Raises:
        ValueError: `numerics` names something else, or `sequences` or `draws` is smaller than 1.

    References:
        [Martens2020], section 5, for the second order.
    """

    name: ClassVar[str] = "integer-products"

    numerics: tuple[str, ...] = get_args(Numerics)
    sequences: int = PROBES
    draws: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        known = get_args(Numerics)
        for one in self.numerics:
            if one not in known:
                raise ValueError(
                    f"numerics must be among {', '.join(known)}, got {one!r}{closest(one, known)}"
                )
        self._draws()

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """The ranges of what layers read."""
        return tuple(ranges_of(graph).values()) if "int8-static" in self.numerics else ()

    def run(self, graph: Graph, analyses: Analyses) -> IntegerProductsReport:
        """Run the sequences once."""
        samples, target = analyses.need_samples(), loss_target(graph)
        sites = [site for site in find_sites(graph) if site.linears]
        emulated = emulators(graph, sites, analyses, self.numerics)
        effects = _Effects(sites, emulated, graph)
        found = GradientRun(graph, target, sites, [effects], together=False)
        self._draws().run(found, target, samples)
        losses = {
            site.weight: dict(zip(self.numerics, effects.losses(site, found.tokens), strict=True))
            for site in sites
        }
        return IntegerProductsReport(losses, target.unit)

    def _draws(self) -> Draws:
        return Draws(self.sequences, self.draws, self.seed)


def ranges_of(graph: Graph) -> dict[Node, Request]:
    """Linear layer with a constant weight -> the request for the range of its input."""
    layers = (layer for site in find_sites(graph) for layer in site.linears)
    return {layer: Request.of(Extremes(), layer.all_input_nodes[0]) for layer in layers}


def emulators(
    graph: Graph, sites: Sequence[Site], analyses: Analyses, numerics: Sequence[str]
) -> dict[Node, tuple[Emulator, ...]]:
    """Linear layer -> what its kernel computes, for each way to round its input."""
    wanted = ranges_of(graph) if "int8-static" in numerics else {}
    known = analyses.statistics(tuple(wanted.values()))
    found: dict[Node, tuple[Emulator, ...]] = {}
    for site in sites:
        held = integers(graph.weight(site.node).float())
        for layer in site.linears:
            ends = [float(end) for end in known[wanted[layer]]] if wanted else [0.0, 0.0]
            found[layer] = tuple(_emulator(one, held, (ends[0], ends[1])) for one in numerics)
    return found


def _emulator(numerics: str, held: Integers, ends: tuple[float, float]) -> Emulator:
    # Codes as float32: sums of this length are exact, or off by less than what is rounded.
    codes, scales = held.codes.float(), held.scales
    if numerics == "int8-static":
        step, zero = static_range(*ends)
        return lambda read: linear_int8_static(read, codes, scales, None, step, zero)
    return lambda read: linear_int8(read, codes, scales, None, numerics == "int8-rows")


class _Effects(Watcher):
    """Adds up, for each loss, what the errors of a layer's result do to it."""

    def __init__(
        self, sites: Sequence[Site], emulated: Mapping[Node, tuple[Emulator, ...]], graph: Graph
    ) -> None:
        """Nothing seen so far."""
        self._site_of = {layer: site for site in sites for layer in site.linears}
        self._emulated, self._graph = emulated, graph
        count = len(next(iter(emulated.values()), ()))
        self._none = torch.zeros(count, dtype=torch.float64)
        self._running = {site.weight: self._none for site in sites}
        self._squares = {site.weight: self._none for site in sites}
        self._errors: dict[Node, tuple[Tensor, Tensor]] = {}

    def start(self, sequences: int) -> None:
        """There is one sequence, whose errors are made when its first gradient comes."""

    def outputs(self, reader: Node, read: Tensor, gradient: Tensor) -> None:
        """Project on the errors of the layer; what several readers give is added."""
        if reader in self._emulated:
            name = self._site_of[reader].weight
            found = torch.einsum("ksto,sto->k", self._errors_of(reader, read), gradient)
            self._running[name] = self._running[name] + found.double()

    def inputs(self, reader: Node, read: Tensor, gradient: Tensor) -> None:
        """Errors of inputs are part of those of results."""

    def finish(self) -> None:
        """The gradients of one loss are complete."""
        for name, effect in self._running.items():
            self._squares[name] = self._squares[name] + effect.square()
        self._running = dict.fromkeys(self._running, self._none)

    def losses(self, site: Site, tokens: int) -> list[float]:
        """The loss per token, for each way to round inputs."""
        found = (self._squares[site.weight] * (0.5 / max(tokens, 1))).tolist()
        return [finite(one, site.weight) for one in found]

    def _errors_of(self, reader: Node, read: Tensor) -> Tensor:
        """``[ways, 1, tokens, out]``; the same for all losses of one sequence."""
        held = self._errors.get(reader)
        if held is None or held[0] is not read:
            x = read.float()
            exact = functional.linear(x, self._graph.weight(self._site_of[reader].node).float())
            errors = torch.stack([emulate(x) - exact for emulate in self._emulated[reader]])
            self._errors[reader] = held = (read, errors)
        return held[1]
