"""What blocks and branches contribute to the output: relevance as a score for dropping them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lamella.ir.graph import Graph
from lamella.passes.base import Analyses
from lamella.passes.scores.base import Level, Meaning, Score, ScoreReport
from lamella.passes.scores.relevance_of_parts import RelevanceOfParts
from lamella.passes.scores.starts import DRAWN
from lamella.passes.scores.structure import parts_of
from lamella.passes.scores.watching import Baseline
from lamella.rules.relevance.presets import Preset


@dataclass(frozen=True)
class RelevanceScore(Score):
    """The relevance that a part adds to the stream, ``D = E |<b - b0, M>|`` over sequences.

    `b` is the exit of the part minus its entry (a post-norm included), `M` the coefficient of
    the exit and `b0` what is expected there anyway. One forward run of a sequence and one sweep
    for each start give the scores of all parts; tokens that an attention mask hides count
    nowhere.

    It is of first order, and says little of a part without which nothing works. Beside the
    measured loss of each single branch (``benchmarks/scores``) it ranked a vision transformer
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
        [Jafari2025], with `b0` as the value in the other run.
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
        self._of_parts()

    def run(self, graph: Graph, analyses: Analyses) -> ScoreReport:
        """Run the sequences one by one, and relevance backwards.

        Raises:
            SamplesError: There are no samples.
            GraphError: No output is a distribution or a vector.
        """
        values: dict[str, float] = {}
        if any(part.droppable for part in parts_of(graph, self.level)):
            found = analyses.get(self._of_parts()).of(self.level).values
            values = {name: value for name, (value,) in found.items()}
        return ScoreReport(self.name, self.level, values, "output", self.meaning)

    def _of_parts(self) -> RelevanceOfParts:
        options = (self.preset, self.start, self.baseline, self.sequences, self.draws, self.seed)
        return RelevanceOfParts((self.level,), *options)
