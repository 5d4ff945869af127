"""Small passes that do what they promise, and passes that don't."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.passes.base import Analyses, Analysis, Effect, Transform


class Network(nn.Module):
    """A table, a norm, two linear layers; token ids in, logits out."""

    def __init__(self, vocabulary: int = 50, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(input_ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return {"logits": self.head(x), "last_hidden_state": x}


@functools.cache
def _network() -> Graph:
    return capture_module(Network().eval(), {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])})


def network() -> Graph:
    """A fresh graph of `Network`."""
    return _network().copy()


@dataclass(frozen=True)
class ScaleBack(Transform):
    """Double the weight of one layer and halve that of the next: exact."""

    name: ClassVar[str] = "scale-back"
    effect: ClassVar[Effect] = Effect.EXACT

    factor: float = 2.0

    def run(self, graph: Graph, analyses: Analyses) -> None:
        for name, factor in (("up", self.factor), ("down", 1 / self.factor)):
            node = graph.weight_node(f"{name}.weight")
            graph.set_weight(node, graph.weight(node) * factor)
        bias = graph.weight_node("up.bias")
        graph.set_weight(bias, graph.weight(bias) * self.factor)


@dataclass(frozen=True)
class Shrink(Transform):
    """Multiply the weight of the head."""

    name: ClassVar[str] = "shrink"
    effect: ClassVar[Effect] = Effect.LOSSY

    factor: float = 0.5

    def run(self, graph: Graph, analyses: Analyses) -> None:
        node = graph.weight_node("head.weight")
        graph.set_weight(node, graph.weight(node) * self.factor)


@dataclass(frozen=True)
class LyingShrink(Transform):
    """Multiply the weight of the head and call that exact."""

    name: ClassVar[str] = "lying-shrink"
    effect: ClassVar[Effect] = Effect.EXACT

    factor: float = 0.99

    def run(self, graph: Graph, analyses: Analyses) -> None:
        Shrink(self.factor).run(graph, analyses)


@dataclass(frozen=True)
class RoundToHalf(Transform):
    """Round the weights to 16 bits."""

    name: ClassVar[str] = "round-to-half"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def run(self, graph: Graph, analyses: Analyses) -> None:
        for node in graph.weight_nodes():
            graph.set_weight(node, graph.weight(node).half().float())


@dataclass(frozen=True)
class Nothing(Transform):
    """Look and leave."""

    name: ClassVar[str] = "nothing"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, graph: Graph, analyses: Analyses) -> None:
        graph.find(aten.linear.default)


@dataclass(frozen=True)
class DropBranch(Transform):
    """Take the branch out: the stream before the residual add goes to its readers."""

    name: ClassVar[str] = "drop-branch"
    effect: ClassVar[Effect] = Effect.LOSSY

    def run(self, graph: Graph, analyses: Analyses) -> None:
        add = graph.find(aten.add.Tensor)[0]
        graph.replace(add, add.args[0])
        analyses.note("one branch went")


@dataclass(frozen=True)
class WrongShape(Transform):
    """Replace a weight by one of another shape."""

    name: ClassVar[str] = "wrong-shape"
    effect: ClassVar[Effect] = Effect.LOSSY

    def run(self, graph: Graph, analyses: Analyses) -> None:
        graph.set_weight(graph.weight_node("down.weight"), torch.zeros(7, 5))


@dataclass(frozen=True)
class WrongDtype(Transform):
    """Replace a weight by one of another dtype."""

    name: ClassVar[str] = "wrong-dtype"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, graph: Graph, analyses: Analyses) -> None:
        node = graph.weight_node("down.weight")
        graph.set_weight(node, graph.weight(node).double())


@dataclass(frozen=True)
class LeaveDropout(Transform):
    """Add a node that draws random numbers and that nothing reads."""

    name: ClassVar[str] = "leave-dropout"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, graph: Graph, analyses: Analyses) -> None:
        layer = graph.find(aten.linear.default)[0]
        graph.call(aten.dropout.default, layer, 0.5, True, after=layer)


@dataclass(frozen=True)
class MakeNaN(Transform):
    """Put NaN into the head."""

    name: ClassVar[str] = "make-nan"
    effect: ClassVar[Effect] = Effect.LOSSY

    def run(self, graph: Graph, analyses: Analyses) -> None:
        node = graph.weight_node("head.weight")
        graph.set_weight(node, graph.weight(node) * float("nan"))


@dataclass(frozen=True)
class Raise(Transform):
    """Edit, then fail."""

    name: ClassVar[str] = "raise"
    effect: ClassVar[Effect] = Effect.EXACT

    error: type[BaseException] = KeyError

    def run(self, graph: Graph, analyses: Analyses) -> None:
        node = graph.weight_node("up.weight")
        graph.set_weight(node, graph.weight(node) * 0)
        raise self.error("midway")


@dataclass(frozen=True)
class CountLinears(Analysis[int]):
    """How many linear layers there are, plus an offset; counts its runs."""

    name: ClassVar[str] = "count-linears"
    runs: ClassVar[list[int]] = []

    offset: int = 0

    def run(self, graph: Graph, analyses: Analyses) -> int:
        self.runs.append(self.offset)
        return len(graph.find(aten.linear.default)) + self.offset


@dataclass(frozen=True)
class Meddle(Analysis[None]):
    """An analysis that edits."""

    name: ClassVar[str] = "meddle"

    def run(self, graph: Graph, analyses: Analyses) -> None:
        RoundToHalf().run(graph, analyses)
