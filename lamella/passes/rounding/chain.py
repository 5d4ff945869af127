"""Rounding a model block by block, each with the inputs that the rounded blocks before it give.

The graph is cut before every group of weights that read one value. What lies before the cut
runs for all samples, the Gram matrix of the value is taken, the weights are rounded, and the
run goes on with them rounded: every operator runs once. In memory are the weights of one group
and their Gram matrix, the values that are alive at the cut, and the codes so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.data import Samples
from lamella.errors import PassError, SamplesError
from lamella.ir.graph import Graph
from lamella.ir.operators import round_to_int8
from lamella.ir.ops import aten
from lamella.ir.quantize import Format, quantize
from lamella.ir.runner import Progress, token_rows
from lamella.ir.segments import Segment, Values
from lamella.passes.rounding.base import Rounded, Rounding, rounded_of
from lamella.passes.rounding.flexround import BlockRun, FlexRound
from lamella.passes.rounding.gram import InputGram
from lamella.passes.rounding.resume import BlockFiles
from lamella.passes.rounding.steps import Group, Stage, stages_of
from lamella.passes.rounding.tokens import TokenWeights
from lamella.passes.sites import Site

_COUNT = "tokens"


@dataclass(frozen=True)
class ChainOptions:
    """How a chain runs.

    Attributes:
        sequential: Whether a layer sees what the rounded layers before it give.
        int8_activations: Whether rounded layers round their inputs to 8 bits in the chain too.
        tokens: How much tokens count.
        files: Where finished blocks are kept, or None.
        progress: Told how many blocks are done.
    """

    sequential: bool = True
    int8_activations: bool = True
    tokens: TokenWeights = field(default_factory=lambda: TokenWeights("uniform"))
    files: BlockFiles | None = None
    progress: Progress | None = None


@dataclass
class ChainNotes:
    """What is to be said about a chain.

    Attributes:
        nearest: Reason -> weights that were rounded to nearest.
        damped: Share of damping -> weights that needed so much.
        few: Weights with fewer tokens than inputs -> tokens, inputs.
        unweighted: Weights whose tokens count alike though a weighting was asked for.
        files: Sentences about files.
        resumed: How many blocks were read from files.
        losses: Relative error of what a block gives before and after learning.
    """

    nearest: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    damped: dict[float, list[str]] = field(default_factory=dict[float, list[str]])
    few: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    unweighted: list[str] = field(default_factory=list[str])
    files: list[str] = field(default_factory=list[str])
    resumed: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    def see(self, weight: str, inputs: int, gram: InputGram, damping: float) -> None:
        """Book what a weight needed that was rounded for its inputs."""
        if gram.tokens < inputs:
            self.few[weight] = (gram.tokens, inputs)
        self.see_damping(weight, damping)

    def see_damping(self, weight: str, damping: float) -> None:
        """Book how much damping a weight needed; infinite where none was enough."""
        if damping == math.inf:
            self.nearest.setdefault("their Gram matrix has no factor", []).append(weight)
        elif damping:
            self.damped.setdefault(damping, []).append(weight)


class Chain:
    """One run of the samples through the blocks of a graph, rounding as it goes."""

    def __init__(
        self,
        graph: Graph,
        samples: Samples,
        formats: Mapping[Site, Format],
        rounding: Rounding,
        options: ChainOptions,
    ) -> None:
        """Prepare; `run` does the work.

        Args:
            graph: Not edited.
            samples: Calibration inputs.
            formats: The weights to round, and into what.
            rounding: The method.
            options: How.
        """
        self.notes = ChainNotes()
        self._graph = graph
        self._samples = samples
        self._formats = formats
        self._rounding = rounding
        self._options = options
        self._done: dict[str, Rounded] = {}
        self._exact: list[Values] = []
        self._site_of = {reader: site for site in formats for reader in site.readers}

    def run(self) -> Mapping[Site, Rounded]:
        """Round all weights.

        Raises:
            SamplesError: The inputs of a layer hold NaN or infinite entries.
            PassError: A weight does.
        """
        cut = stages_of(self._graph, self._formats)
        known = [self._read(index, stage) for index, stage in enumerate(cut.stages)]
        self.notes.resumed = sum(one is not None and bool(one) for one in known)
        unknown = [i for i, (one, stage) in enumerate(zip(known, cut.stages, strict=True))
                   if stage.steps and one is None]  # fmt: skip
        last = max(unknown, default=-1)
        states = [cut.program.start(sample) for sample in self._samples] if unknown else []
        # What the model as it was gives, where a method wants to come close to that.
        learns = isinstance(self._rounding, FlexRound)
        self._exact = [dict(values) for values in states] if learns else []
        for index, stage in enumerate(cut.stages):
            found = known[index]
            if index <= last and isinstance(self._rounding, FlexRound):
                self._learn(self._rounding, stage, states, found)
            elif index <= last:
                self._stage(stage, states, found, final=index == last)
            elif found:
                self._done.update(found)
            if found is None and stage.steps and self._options.files is not None:
                self._write(self._options.files, index, stage)
            if self._options.progress is not None:
                self._options.progress(index + 1, len(cut.stages))
        self._book(cut.stages)
        return {site: self._done[site.weight] for site in self._formats}

    def _stage(
        self,
        stage: Stage,
        states: Sequence[Values],
        known: Mapping[str, Rounded] | None,
        *,
        final: bool,
    ) -> None:
        """Run a block, and round its weights where they are not known."""
        if known is None and self._options.tokens.kind == "attention":
            weights = {node: self._weight(node) for node in stage.segment.weights}
            self._options.tokens.enter(stage, states, weights)
            del weights
        for step in stage.steps:
            self._advance(step.piece, states)
            if known is None:
                self._done.update(self._round(step.group, states))
            else:
                self._done.update({s.weight: known[s.weight] for s in step.group.sites})
        if not final:
            self._advance(stage.rest, states)

    def _learn(
        self,
        rounding: FlexRound,
        stage: Stage,
        states: Sequence[Values],
        known: Mapping[str, Rounded] | None,
    ) -> None:
        """Run a block as it was and as it is rounded, and learn its weights in between."""
        segment = stage.segment
        weights = segment.read_weights(self._graph)
        for values in self._exact:
            segment.run(values, weights)
        if known is not None:
            self._done.update(known)
        else:
            self._done.update(self._learned(rounding, stage, states))
        self._advance(segment, states)

    def _learned(
        self, rounding: FlexRound, stage: Stage, states: Sequence[Values]
    ) -> dict[str, Rounded]:
        for site in stage.sites:
            _check_weight(self._graph, site)
        alive = self._exact[0]
        outputs = tuple(n for n in stage.segment.nodes if n in alive and _is_float(alive[n]))
        alone = [s for step in stage.steps if step.group.reason for s in step.group.sites]
        found = {site.weight: self._nearest(site) for site in alone}
        self._done.update(found)
        learned = [site for site in stage.sites if site not in alone]
        if not outputs:
            reason = "no block reads what they give"
            self.notes.nearest.setdefault(reason, []).extend(site.weight for site in learned)
            return found | {site.weight: self._nearest(site) for site in learned}
        if not learned:
            return found
        run = BlockRun(
            stage.segment,
            {node: self._weight(node) for node in stage.segment.weights},
            {site: self._formats[site] for site in learned},
            states,
            self._exact,
            outputs,
        )
        rounded, losses = rounding.reconstruct(run)
        self.notes.losses.append(losses)
        return found | rounded

    def _advance(self, piece: Segment, states: Sequence[Values]) -> None:
        weights = {node: self._weight(node) for node in piece.weights}
        calls = {node: call for node in piece.nodes if (call := self._call(node)) is not None}
        for values in states:
            piece.run(values, weights, calls=calls)

    def _weight(self, node: Node) -> Tensor:
        """The weight as it is computed with from here on."""
        done = self._done.get(str(node.target)) if self._options.sequential else None
        if done is None:
            return self._graph.weight(node)
        return done.value().to(node.meta["val"].dtype)

    def _call(self, node: Node) -> Any:
        """What a rounded layer computes, if that is not just a product with its weight."""
        site = self._site_of.get(node)
        if site is None or node.target is not aten.linear.default:
            return None
        done = self._done.get(site.weight) if self._options.sequential else None
        if done is None or done.codes is None or not self._options.int8_activations:
            return None
        return _Rounding8(done.codes.format.block, done.columns)

    # ---- one group ----------------------------------------------------------------------

    def _round(self, group: Group, states: Sequence[Values]) -> dict[str, Rounded]:
        for site in group.sites:
            _check_weight(self._graph, site)
        if group.value is None:
            return {s.weight: self._nearest(s) for s in group.sites}
        gram = self._gram(group, states)
        results: dict[str, Rounded] = {}
        for format, sites in self._alike(group.sites):
            weights = [self._graph.weight(site.node).detach().float() for site in sites]
            whole = weights[0] if len(weights) == 1 else torch.cat(weights)
            result = self._rounding.round(whole, format, gram)
            start = 0
            for site in sites:
                results[site.weight] = result.rows(start, start + site.shape[0])
                start += site.shape[0]
        for site in group.sites:
            if gram.tokens < site.shape[1]:
                self.notes.few[site.weight] = (gram.tokens, site.shape[1])
        return results

    def _alike(self, sites: Sequence[Site]) -> Iterator[tuple[Format, list[Site]]]:
        """Weights that are rounded as one: of one format, if the method allows it."""
        by_format: dict[tuple[Format, str], list[Site]] = {}
        for site in sites:
            apart = "" if self._rounding.joins_rows else site.weight
            by_format.setdefault((self._formats[site], apart), []).append(site)
        for (format, _), several in by_format.items():
            yield format, several

    def _nearest(self, site: Site) -> Rounded:
        return Rounded(quantize(self._graph.weight(site.node), self._formats[site]))

    def _gram(self, group: Group, states: Sequence[Values]) -> InputGram:
        assert group.value is not None
        total: Tensor | None = None
        mass, tokens = 0.0, 0
        for sample, values in enumerate(states):
            rows, counts = self._rows(group, sample, values)
            weighted = rows if counts is None else rows * counts[:, None]
            product = weighted.t() @ rows
            total = product if total is None else total.add_(product)
            tokens += rows.shape[0]
            mass += rows.shape[0] if counts is None else float(counts.sum())
        if total is None or tokens == 0 or mass <= 0:
            raise SamplesError(f"the samples hold no token for {group.value.name}")
        if not bool(torch.isfinite(total).all()):
            raise SamplesError(_overflow(group, states))
        return InputGram(total.div_(mass), tokens)

    def _rows(self, group: Group, sample: int, values: Values) -> tuple[Tensor, Tensor | None]:
        """The inputs of the group, ``[tokens, in]``, and how much each token counts."""
        assert group.value is not None
        value: Tensor = values[group.value]
        mask = None if group.mask is None else values[group.mask].bool().flatten()
        rows = token_rows(value, -1, mask).float()
        weighting = self._options.tokens
        if weighting.kind == "uniform":
            return rows, None
        counts = weighting.of(sample, group.sites[0].readers[0], value)
        if counts is None:
            if sample == 0:
                self.notes.unweighted += [site.weight for site in group.sites]
            return rows, None
        return rows, token_rows(counts.unsqueeze(-1), -1, mask).flatten().float()

    # ---- what is kept and said ----------------------------------------------------------

    def _read(self, index: int, stage: Stage) -> dict[str, Rounded] | None:
        """The weights of a block that is on disk, or None."""
        files = self._options.files
        if files is None or not stage.steps:
            return None
        tensors, why = files.read(index)
        if why is not None:
            self.notes.files.append(f"{why}; its block was rounded again")
        if tensors is None:
            return None
        found: dict[str, Rounded] = {}
        for site in stage.sites:
            prefix = f"{site.weight}/"
            parts = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            found[site.weight] = rounded_of(parts, self._formats[site], site.shape)
            if _COUNT in parts:
                self.notes.few[site.weight] = (int(parts[_COUNT]), site.shape[1])
        return found

    def _write(self, files: BlockFiles, index: int, stage: Stage) -> None:
        tensors: dict[str, Tensor] = {}
        for site in stage.sites:
            parts = self._done[site.weight].tensors()
            if site.weight in self.notes.few:
                parts[_COUNT] = torch.tensor(self.notes.few[site.weight][0])
            tensors |= {f"{site.weight}/{name}": value for name, value in parts.items()}
        files.write(index, tensors)

    def _book(self, stages: Sequence[Stage]) -> None:
        for step in (step for stage in stages for step in stage.steps):
            for site in step.group.sites:
                damping = self._done[site.weight].damping
                if step.group.reason is not None:
                    self.notes.nearest.setdefault(step.group.reason, []).append(site.weight)
                else:
                    self.notes.see_damping(site.weight, damping)


@dataclass(frozen=True)
class _Rounding8:
    """A linear layer whose kernel rounds its input to 8 bits."""

    block: int
    columns: Tensor | None

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rounded = round_to_int8(input, self.block)
        if self.columns is not None:
            # The columns beside the codes are a layer of their own, which rounds nothing.
            rounded[..., self.columns] = input[..., self.columns]
        return functional.linear(rounded, weight, bias)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _check_weight(graph: Graph, site: Site) -> None:
    weight = graph.weight(site.node)
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise PassError(
            f"weight {site.weight!r} can't be quantized: {count} entries are NaN or infinite"
        )


def _overflow(group: Group, states: Sequence[Values]) -> str:
    assert group.value is not None
    names = ", ".join(site.weight for site in group.sites)
    for sample, values in enumerate(states):
        value: Tensor = values[group.value]
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            return (
                f"the value of {group.value.name}, the input of {names}, holds {bad} NaN or "
                f"infinite entries for sample {sample}; look for inputs or weights that overflow"
            )
    return (
        f"the value of {group.value.name}, the input of {names}, is so large that its squares "
        f"overflow; look for inputs or weights that overflow"
    )
