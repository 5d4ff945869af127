"""What heads, experts and channels contribute to the output, beside blocks and branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from torch import Tensor

from lamella.errors import GraphError, known_names
from lamella.ir.graph import Graph
from lamella.passes.base import Analyses, Analysis
from lamella.passes.parts import Parts, find_parts
from lamella.passes.scores.base import Meaning, finite
from lamella.passes.scores.starts import DRAWN, Draws, check_options
from lamella.passes.scores.target import first_sequences
from lamella.passes.scores.watching import (
    Baseline,
    Watched,
    check_baseline,
    watch_parts,
    watch_samples,
    watch_stream,
)
from lamella.rules.relevance.presets import Preset, preset_of

Kind = Literal["block", "sublayer", "head", "head-group", "expert", "channel"]


@dataclass(frozen=True)
class PartScores:
    """A score of all parts of one kind.

    Attributes:
        kind: What is scored.
        values: Name of a branch -> score of each of its heads, experts or channels, in order;
            ``<branch>.expert.<number>`` for the channels of an expert; of a block or a branch one
            number.
        flows: The same with their signs: the mean of ``<b - b0, M>``.
        unit: Of both.
        higher_means: What a larger value says of a part.
    """

    kind: Kind
    values: Mapping[str, tuple[float, ...]]
    flows: Mapping[str, tuple[float, ...]] = field(repr=False)
    unit: str = "output"
    higher_means: Meaning = "important"

    def order(self) -> tuple[tuple[str, int], ...]:
        """Name and number of every part, the most dispensable first; ties in order of the graph."""
        parts = [(name, place) for name, each in self.values.items() for place in range(len(each))]
        sign = -1.0 if self.higher_means == "dispensable" else 1.0
        return tuple(sorted(parts, key=lambda part: sign * self.values[part[0]][part[1]]))


@dataclass(frozen=True)
class PartScoreReport:
    """Scores of parts of several kinds, from one and the same run.

    Attributes:
        by: Name of the score.
        kinds: Kind -> scores, of the kinds that were asked for.
    """

    by: str
    kinds: Mapping[Kind, PartScores]

    def of(self, kind: Kind) -> PartScores:
        """The scores of one kind.

        Raises:
            ValueError: It was not asked for.
        """
        if kind not in self.kinds:
            raise ValueError(f"there are no scores of {kind!r}{known_names(kind, self.kinds)}")
        return self.kinds[kind]


@dataclass(frozen=True)
class RelevanceOfParts(Analysis[PartScoreReport]):
    """What the output loses in first order without a part: ``D = E |<b - b0, M>|``.

    `b` is what a head, an expert (times the weight that the router gives it), a channel, a branch
    or a block adds, `M` its coefficient, `b0` what takes its place. All parts of all kinds come
    from one forward run of each sequence and one sweep for each start. Under preset ``gradient``
    the score is the first-order change of the output; of the branches it is that of
    `RelevanceScore`. The tokens of an expert are those that are sent to it; other experts do not
    take its place here.

    Attributes:
        kinds: What is scored: ``"block"``, ``"sublayer"``, ``"head"``, ``"head-group"`` (heads
            that share keys and values), ``"expert"``, ``"channel"`` (of the hidden layer of an
            MLP or of an expert, of a state-space branch, between convolutions).
        preset: Name of the rules, or a preset.
        start: As in `RelevanceScore`.
        baseline: What `b0` is: ``"zero"``, or ``"mean"`` of `b` over all tokens of the samples.
        sequences: How many sequences of the samples run, one at a time.
        draws: Starts per sequence, where they are drawn.
        seed: Of the draws.

    Raises:
        ValueError: An option has another value.

    References:
        [Michel2019], equation 2, for heads under the gradient; [Jafari2025] for other rules, with
        `b0` as the value in the other run.
    """

    name: ClassVar[str] = "relevance-of-parts"

    kinds: tuple[Kind, ...] = ("head", "expert", "channel")
    preset: str | Preset = "cp"
    start: str = DRAWN
    baseline: Baseline = "zero"
    sequences: int = 32
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self.preset, self.start, self.sequences, self.draws)
        check_baseline(self.baseline)
        for kind in self.kinds:
            if kind not in get_args(Kind):
                raise ValueError(f"unknown kind {kind!r}{known_names(kind, get_args(Kind))}")

    def run(self, graph: Graph, analyses: Analyses) -> PartScoreReport:
        """Run the sequences one by one, and relevance backwards.

        Raises:
            SamplesError: There are no samples.
            GraphError: No output is a distribution or a vector, or the graph has no part of any
                of the kinds.
        """
        samples = first_sequences(analyses.need_samples(), self.sequences)
        watched = self._watched(graph)
        if not any(watched.values()):
            raise GraphError(
                f"the model has no {' and no '.join(self.kinds)}; kinds are "
                f"{', '.join(get_args(Kind))}"
            )
        everything = [one for each in watched.values() for one, _ in each]
        draws = Draws.of(self.start, self.draws, self.seed)
        watch_samples(graph, samples, preset_of(self.preset), everything, draws)
        return PartScoreReport(self.name, {kind: _scores(kind, watched[kind]) for kind in watched})

    def _watched(self, graph: Graph) -> dict[Kind, list[_Seen]]:
        """What is watched for each kind, with the parts that it is."""
        found: dict[Kind, list[_Seen]] = {kind: [] for kind in self.kinds}
        streams = {"block": graph.blocks, "sublayer": graph.stream.sublayers}
        for kind in self.kinds:
            parts = [part for part in streams.get(kind, ()) if part.droppable]
            found[kind] += [(one, None) for one in watch_stream(graph, parts, self.baseline)]
        for parts in find_parts(graph):
            if parts.kind in found:
                found[parts.kind].append((watch_parts(graph, parts, self.baseline), parts))
        return found


_Seen = tuple[Watched, Parts | None]


def _scores(kind: Kind, watched: Sequence[_Seen]) -> PartScores:
    values: dict[str, tuple[float, ...]] = {}
    flows: dict[str, tuple[float, ...]] = {}
    for one, parts in watched:
        effects = one.effects()
        for name, some in _named(one, parts, effects):
            values[name] = tuple(finite(v, name) for v in some.abs().mean(0).tolist())
            flows[name] = tuple(some.mean(0).tolist())
    return PartScores(kind, values, flows)


def _named(one: Watched, parts: Parts | None, effects: Tensor) -> list[tuple[str, Tensor]]:
    """Names, and effects of the parts of each, ``[sweeps, parts]``."""
    if parts is None:
        return [(one.names[0], effects)]
    if parts.kind != "channel" or parts.experts is None:
        return [(parts.name, effects)]
    by_expert = effects.split(parts.count, dim=1)
    return [(f"{parts.name}.expert.{index}", some) for index, some in enumerate(by_expert)]
