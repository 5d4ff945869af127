"""What blocks and branches contribute to the output: relevance as a score for dropping them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.runner import token_mask
from lamella.ir.stream import Block, Sublayer
from lamella.passes.base import Analyses
from lamella.passes.relevance.request import relevance_of
from lamella.passes.scores.base import Level, Meaning, Score, ScoreReport, finite
from lamella.passes.scores.starts import DRAWN, Draws, check_start, seeds_of
from lamella.passes.scores.structure import parts_of
from lamella.passes.scores.sweeps import Sweeps
from lamella.passes.scores.target import first_sequences, loss_target, single_sequences
from lamella.rules.relevance.presets import Preset, preset_of

Baseline = Literal["zero", "mean"]


@dataclass(frozen=True)
class RelevanceScore(Score):
    """The relevance that a part adds to the stream, ``D = E |<b - b0, M>|`` over sequences.

    `b` is the exit of the part minus its entry (a post-norm included), `M` the coefficient of
    the exit and `b0` what is expected there anyway. One forward run of a sequence and one sweep
    for each start give the scores of all parts; tokens that an attention mask hides count
    nowhere.

    It is of first order, and says little of a part without which nothing works. Beside the
    measured loss of each single branch (``benchmarks/scores.py``) it ranked a vision transformer
    a little better than the cosine of `lim` and a language model a little worse, chose a worse
    quarter of the branches of the former, and was far better than `zd` on both. Drawn labels
    were better than the largest logit on the language model, except under preset ``gradient``;
    the mean as `b0` ranks it better than zero although zero is what takes the place of a part
    that is dropped: a constant hardly passes the norms behind it.

    Attributes:
        level: What is scored.
        preset: Name of the rules, or a preset.
        start: Where relevance starts: ``"drawn"`` for the loss of labels that are drawn from the
            model itself (random projections of an output that is no logits), or a seed such as
            ``"logit"``, ``"contrastive"``, ``"softmax"`` or ``"logit:7"``.
        baseline: What `b0` is: ``"zero"``, or ``"mean"`` of `b` over all tokens of the samples.
        sequences: How many sequences of the samples run, one at a time.
        draws: Starts per sequence, where they are drawn.
        seed: Of the draws.

    Raises:
        ValueError: An option has another value.

    References:
        `methods/relevance.md`, section 7.1.
    """

    name: ClassVar[str] = "relevance"
    meaning: ClassVar[Meaning] = "important"

    level: Level = "block"
    preset: str | Preset = "cp"
    start: str = DRAWN
    baseline: Baseline = "mean"
    sequences: int = 32
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        preset_of(self.preset)
        check_start(self.start)
        if self.baseline not in get_args(Baseline):
            raise ValueError(f"baseline must be zero or mean, got {self.baseline!r}")
        if self.sequences < 1 or self.draws < 1:
            raise ValueError(
                f"sequences and draws must be at least 1, got {self.sequences} and {self.draws}"
            )

    def run(self, graph: Graph, analyses: Analyses) -> ScoreReport:
        """Run the sequences one by one, and relevance backwards.

        Raises:
            SamplesError: There are no samples.
            GraphError: No output is a distribution or a vector.
        """
        samples = first_sequences(analyses.need_samples(), self.sequences)
        target = loss_target(graph)
        parts = _parts(graph, self.level)
        exits = [part.exit for part in parts]
        kept = [name for part in parts for name in part.reads]
        sweeps = Sweeps(graph, preset_of(self.preset), target, exits, kept)
        draws = Draws(self.start, self.draws, torch.Generator().manual_seed(self.seed))
        for sample in single_sequences(samples):
            output = sweeps.forward(sample)
            for part in parts:
                part.look(sweeps)
            for seed in seeds_of(output, sweeps, target, draws):
                _sweep(sweeps, seed, parts)
        values = {part.name: finite(part.effect(self.baseline), part.name) for part in parts}
        return ScoreReport(self.name, self.level, values, "output", self.meaning)


def _sweep(sweeps: Sweeps, seed: Tensor, parts: Iterable[_Part]) -> None:
    """One sweep; every part takes what its exit gets."""
    by_exit: dict[str, list[_Part]] = {}
    for part in parts:
        part.begin()
        by_exit.setdefault(part.exit, []).append(part)

    def seen(name: str, coefficient: Tensor) -> None:
        for part in by_exit[name]:
            part.take(coefficient)

    sweeps.backward(seed, seen)


class _Part:
    """What is known of one block or branch while the samples run."""

    def __init__(self, graph: Graph, part: Block | Sublayer, *, alone: bool) -> None:
        """Find out what to read.

        Args:
            graph: Of the model.
            part: A block or branch.
            alone: Whether no other part has the same exit; else only the branch is its own.
        """
        self.name = part.name
        self.exit = part.exit.name
        branch = None if alone or isinstance(part, Block) else part.branch.name
        self._values = (self.exit, part.entry.name) if branch is None else (branch,)
        mask = token_mask(graph, part.exit)
        self._mask = None if mask is None else mask.name
        self._axis = 1 if _holds_images(part.entry, part.nodes) else -1
        self._shown: Tensor | None = None
        self._added = torch.zeros(())
        self._total = torch.zeros((), dtype=torch.float64)
        self._tokens = 0
        self._effects: list[float] = []
        self._sums: list[Tensor] = []

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the nodes whose values are looked at."""
        return self._values if self._mask is None else (*self._values, self._mask)

    def look(self, sweeps: Sweeps) -> None:
        """What the part adds to the stream for one sample."""
        self._shown = None if self._mask is None else sweeps.value(self._mask).bool().flatten()
        values = [self._rows(sweeps.value(name)) for name in self._values]
        self._added = values[0] if len(values) == 1 else values[0] - values[1]
        self._total = self._total + self._added.sum(0)
        self._tokens += len(self._added)

    def begin(self) -> None:
        """A sweep starts; without a coefficient the part has no effect."""
        self._effects.append(0.0)
        self._sums.append(torch.zeros((), dtype=torch.float64))

    def take(self, coefficient: Tensor) -> None:
        """The coefficient of the exit in this sweep."""
        rows = self._rows(coefficient)
        self._effects[-1] = float(relevance_of(self._added, rows).sum())
        self._sums[-1] = rows.sum(0)

    def effect(self, baseline: Baseline) -> float:
        """The mean size of the effect over all sweeps."""
        effects = torch.tensor(self._effects, dtype=torch.float64)
        if baseline == "mean" and self._tokens:
            mean = self._total / self._tokens
            effects = effects - torch.stack([(total * mean).sum() for total in self._sums])
        return float(effects.abs().mean())

    def _rows(self, value: Tensor) -> Tensor:
        """``[tokens, channels]`` in float64, without hidden tokens."""
        rows = value.movedim(self._axis, -1).double()
        rows = rows.reshape(-1, rows.shape[-1])
        return rows if self._shown is None else rows[self._shown]


def _parts(graph: Graph, level: Level) -> list[_Part]:
    parts = [part for part in parts_of(graph, level) if part.droppable]
    exits = Counter(part.exit for part in parts)
    return [_Part(graph, part, alone=exits[part.exit] == 1) for part in parts]


def _holds_images(value: Node, nodes: Iterable[Node]) -> bool:
    """Whether the channels of a stream are in front: ``[batch, channels, height, width]``."""
    convolves = any(node.target is aten.conv2d.default for node in nodes)
    return convolves and value.meta["val"].ndim == 4
