"""Drop whole blocks of the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lamella.errors import PassError
from lamella.ir.graph import Graph
from lamella.ir.stream import Block
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.scores import score
from lamella.passes.transforms import selecting
from lamella.passes.transforms.dropping import drop
from lamella.passes.transforms.indices import parse_indices


@dataclass(frozen=True)
class DropBlocks(Transform):
    """Let the residual stream run past some blocks: ``x_(l+1) = x_l``.

    Which ones: those in `blocks`; or `count` of them, the least important by the score `by`, or
    evenly spaced with ``spacing=even``. A post-norm behind a dropped block goes with it; a
    hidden state that was an output is that of the block before. Blocks behind which the stream
    has another shape (projected shortcuts) never go.

    Attributes:
        count: How many go.
        blocks: Which ones go, counted from 0 over all streams: ``1,5`` or ``3-7``. Nothing is
            protected then.
        by: Name of the score.
        spacing: ``"score"``, or ``"even"``: those that stay are evenly spaced over the stream,
            its first and last block among them. Needs a model with one stream, or `stack`.
        stack: ``"encoder"`` or ``"decoder"``; None means all streams.
        iterative: Score again after each block that goes; slower, and better from about a
            quarter of the blocks on.
        keep_first: So many blocks at the beginning of each stream never go by score. One-shot
            scores often put the first block last although nothing works without it.
        keep_last: Likewise at the end.
        seed: Of a score that draws at random.

    Raises:
        ValueError: Options contradict each other.

    References:
        [Men2024], section 3, for dropping by similarity; [Liu2024] for even spacing.
    """

    name: ClassVar[str] = "drop-blocks"
    effect: ClassVar[Effect] = Effect.LOSSY

    count: int | None = None
    blocks: tuple[int | str, ...] = ()
    by: str = "similarity"
    spacing: Literal["score", "even"] = "score"
    stack: Literal["encoder", "decoder"] | None = None
    iterative: bool = False
    keep_first: int = 1
    keep_last: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        ends = (self.keep_first, self.keep_last)
        selecting.check_options("blocks", self.count, self.blocks, ends)
        if self.spacing == "even" and self.iterative:
            raise ValueError("even spacing has no score to compute again; leave out iterative")
        parse_indices(self.blocks)
        score(self.by, "block", seed=self.seed)

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Choose and drop."""
        if self.count is None:
            wanted = parse_indices(self.blocks)
            _drop(graph, analyses, selecting.by_index(graph.blocks, wanted, "block"))
        elif self.spacing == "even":
            _drop(graph, analyses, selecting.evenly(self._one_stack(graph), self.count))
        elif self.iterative:
            selecting.check_count(self._candidates(graph), self.count, "blocks")
            for _ in range(self.count):
                _drop(graph, analyses, self._lowest(graph, analyses, 1))
        else:
            _drop(graph, analyses, self._lowest(graph, analyses, self.count))

    def _lowest(self, graph: Graph, analyses: Analyses, count: int) -> list[Block]:
        by = score(self.by, "block", seed=self.seed)
        return selecting.by_score(self._candidates(graph), count, analyses, by, "blocks")

    def _candidates(self, graph: Graph) -> list[Block]:
        blocks = selecting.interior(graph, self.keep_first, self.keep_last)
        return [block for block in blocks if self.stack in (None, block.stack)]

    def _one_stack(self, graph: Graph) -> list[Block]:
        found = selecting.stacks([b for b in graph.blocks if self.stack in (None, b.stack)])
        if len(found) != 1:
            names = ", ".join(sorted({block.stack or block.name for s in found for block in s}))
            raise PassError(
                f"even spacing is over one stream, and there are {len(found)}"
                f"{f' ({names}); say which with stack=' if found else ''}"
            )
        return found[0]


def _drop(graph: Graph, analyses: Analyses, blocks: Sequence[Block]) -> None:
    parts = [sublayer for block in blocks for sublayer in block.sublayers]
    drop(graph, analyses, parts, [block.name for block in blocks])
