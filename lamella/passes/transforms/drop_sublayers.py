"""Drop single branches of the residual stream: attention here, an MLP there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lamella.errors import PassError, closest
from lamella.ir.graph import Graph
from lamella.ir.stream import Sublayer
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.scores import score
from lamella.passes.transforms import selecting
from lamella.passes.transforms.dropping import drop
from lamella.passes.transforms.indices import parse_indices

KINDS = ("attention", "cross-attention", "mlp", "moe", "conv", "ssm", "linear")
"""What a branch can be."""


@dataclass(frozen=True)
class DropSublayers(Transform):
    """Drop branches of the residual stream: ``x + f(x)`` becomes ``x``.

    Which ones: those in `sublayers`; or the `count` least important of the given `kinds` by the
    score `by`. A scalar on the shortcut stays, a post-norm behind the branch goes with it, and
    an arm of a parallel block goes without the other.

    Attributes:
        count: How many go.
        sublayers: Which ones go, counted from 0 over all streams: ``1,5`` or ``3-7``.
        kinds: Only these may go by score: attention, cross-attention, mlp, moe, conv, ssm,
            linear; empty means any.
        by: Name of the score.
        iterative: Score again after each branch that goes.
        keep_first: The branches of so many blocks at the beginning of each stream never go by
            score.
        keep_last: Likewise at the end.
        seed: Of a score that draws at random.

    Raises:
        ValueError: Options contradict each other, or a kind is unknown.

    References:
        [He2024], section 3.
    """

    name: ClassVar[str] = "drop-sublayers"
    effect: ClassVar[Effect] = Effect.LOSSY

    count: int | None = None
    sublayers: tuple[int | str, ...] = ()
    kinds: tuple[str, ...] = ()
    by: str = "similarity"
    iterative: bool = False
    keep_first: int = 1
    keep_last: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        ends = (self.keep_first, self.keep_last)
        selecting.check_options("sublayers", self.count, self.sublayers, ends)
        strange = [kind for kind in self.kinds if kind not in KINDS]
        if strange:
            raise ValueError(
                f"unknown kind {strange[0]!r}{closest(strange[0], KINDS)} (known: "
                f"{', '.join(KINDS)})"
            )
        parse_indices(self.sublayers)
        score(self.by, "sublayer", seed=self.seed)

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Choose and drop."""
        if self.count is None:
            wanted = parse_indices(self.sublayers)
            chosen = selecting.by_index(graph.stream.sublayers, wanted, "sublayer")
            self._check_kinds(chosen)
            _drop(graph, analyses, chosen)
        elif self.iterative:
            selecting.check_count(self._candidates(graph), self.count, "sublayers")
            for _ in range(self.count):
                _drop(graph, analyses, self._lowest(graph, analyses, 1))
        else:
            _drop(graph, analyses, self._lowest(graph, analyses, self.count))

    def _lowest(self, graph: Graph, analyses: Analyses, count: int) -> list[Sublayer]:
        by = score(self.by, "sublayer", seed=self.seed)
        return selecting.by_score(self._candidates(graph), count, analyses, by, "sublayers")

    def _candidates(self, graph: Graph) -> list[Sublayer]:
        protected = _protected(graph, self.keep_first, self.keep_last)
        return [
            part
            for part in graph.stream.sublayers
            if part.droppable
            and part.index not in protected
            and (not self.kinds or part.kind in self.kinds)
        ]

    def _check_kinds(self, chosen: list[Sublayer]) -> None:
        other = [f"{p.index} ({p.kind})" for p in chosen if self.kinds and p.kind not in self.kinds]
        if other:
            raise PassError(
                f"sublayer {', '.join(other)} is not one of the kinds {', '.join(self.kinds)}"
            )


def _protected(graph: Graph, first: int, last: int) -> set[int]:
    """Indices of the sublayers of the first and last blocks of each stream."""
    found: set[int] = set()
    for stack in selecting.stacks(graph.blocks):
        ends = [*stack[:first], *stack[max(len(stack) - last, 0) :]]
        found |= {part.index for block in ends for part in block.sublayers}
    return found


def _drop(graph: Graph, analyses: Analyses, parts: list[Sublayer]) -> None:
    drop(graph, analyses, parts, [part.name for part in parts])
