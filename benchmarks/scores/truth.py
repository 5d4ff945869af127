"""The measured loss of single changes for each unseen sequence, kept on disk as soon as known.

The key of a change is the digest of what it changes the model to, of the model and of the
sequences: a run that was stopped goes on where it was, and one with another rounding, model or
data measures again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.scores.cases import Case, outputs
from benchmarks.zoo.cache import ROOT
from lamella.data import Batch, Samples
from lamella.ir.graph import Graph
from lamella.ir.operators import round_to_int8
from lamella.ir.ops import aten
from lamella.ir.quantize import Format, dequantized
from lamella.ir.segments import Calls, Program, Values, program
from lamella.ir.stream import Sublayer
from lamella.passes.base import Analyses
from lamella.passes.scores.base import Level
from lamella.passes.scores.structure import parts_of
from lamella.passes.scores.target import loss_target
from lamella.passes.sites import Site, find_sites
from lamella.passes.transforms.dropping import drop

logger = logging.getLogger(__name__)

Losses = tuple[float, ...]
"""The loss of each sequence, summed over its tokens."""


@dataclass(frozen=True)
class Measured:
    """The losses of changes of one model on some sequences.

    Attributes:
        graph: The model.
        batches: The sequences.
        name: Of the file of what is known.
    """

    graph: Graph
    batches: tuple[Batch, ...]
    name: str

    def of(self, key: str, measure: Callable[[], Losses]) -> Losses:
        """The losses of the change `key`, by `measure` if they are not known."""
        if key not in self._known:
            losses = measure()
            with self._path.open("a") as file:
                file.write(json.dumps([key, losses]) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._known[key] = losses
        return self._known[key]

    def knows(self, key: str) -> bool:
        """Whether the losses of a change were measured."""
        return key in self._known

    def known(self, key: str) -> Losses:
        """The losses of a change that was measured."""
        return self._known[key]

    @cached_property
    def tokens(self) -> Tensor:
        """Rows of the output of each sequence, float64."""
        return torch.tensor([len(rows) for rows in self.references], dtype=torch.float64)

    @cached_property
    def references(self) -> list[Tensor]:
        """The output of the unchanged model for each sequence."""
        return outputs(self.graph, self.batches)

    def losses(self, changed: Iterable[Tensor]) -> Losses:
        """The loss of each sequence, whose outputs are `changed`."""
        target = loss_target(self.graph)
        pairs = zip(self.references, changed, strict=True)
        return tuple(target.loss(one, other) for one, other in pairs)

    @cached_property
    def _path(self) -> Path:
        sha = hashlib.sha256(Samples(self.batches).digest.encode())
        for node in self.graph.weight_nodes():
            sha.update(str(node.target).encode() + digest(self.graph.weight(node)))
        folder = ROOT.parent / "scores"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.name}-{sha.hexdigest()[:16]}.jsonl"

    @cached_property
    def _known(self) -> dict[str, Losses]:
        if not self._path.exists():
            return {}
        # A line that a killed run left half is measured again.
        lines = [line for line in self._path.read_text().split("\n")[:-1] if line.endswith("]]")]
        return {key: tuple(losses) for key, losses in map(json.loads, lines)}


def measured_on_unseen(case: Case) -> Measured:
    """Losses on the sequences that no score has seen."""
    return Measured(case.graph, case.unseen, case.name)


def digest(value: Tensor) -> bytes:
    """Of the bytes of a tensor."""
    return hashlib.sha256(
        value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    ).digest()


# ---- widths of single weights -------------------------------------------------------------


def bit_losses(measured: Measured, formats: Sequence[Format]) -> dict[str, dict[Format, Losses]]:
    """The losses of every weight in every format, all others left as they are."""
    sites = sites_of_target(measured.graph)
    keys = {site: {f: f"{site.weight} {rounding_key(f)}" for f in formats} for site in sites}
    new = [site for site in sites if not all(map(measured.knows, keys[site].values()))]
    for trial in single_trials(measured, new):
        for format, key in keys[trial.site].items():
            measured.of(key, functools.partial(trial.rounded, format))
    return {
        site.weight: {f: measured.known(key) for f, key in by_format.items()}
        for site, by_format in keys.items()
    }


def sites_of_target(graph: Graph) -> list[Site]:
    """The weights that the compared output depends on."""
    running = _running(graph)
    inside = {node for segment in running.segments for node in segment.nodes}
    return [site for site in find_sites(graph) if site.readers[0] in inside]


def _running(graph: Graph) -> Program:
    target = loss_target(graph)
    return program(graph, [n for n in (target.node, target.mask) if n is not None])


def single_trials(measured: Measured, sites: Sequence[Site]) -> Iterator[Trial]:
    """One weight after the other, in the order of the stream, to be changed alone."""
    if not sites:
        return
    graph, running = measured.graph, _running(measured.graph)
    states = [running.start(batch) for batch in measured.batches]
    for place, segment in enumerate(running.segments):
        inside = set(segment.nodes)
        for site in (site for site in sites if site.readers[0] in inside):
            yield Trial(measured, running, states, place, site)
        logger.info("%s: segment %d of %d", measured.name, place + 1, len(running.segments))
        weights = segment.read_weights(graph)
        for values in states:
            segment.run(values, weights)


@dataclass(frozen=True)
class Trial:
    """One weight, and the sequences stopped before the segment that reads it first."""

    measured: Measured
    running: Program
    states: Sequence[Values]
    place: int
    site: Site

    def rounded(self, format: Format) -> Losses:
        """The losses with the weight in a format."""
        value = dequantized(self.measured.graph.weight(self.site.node), format)
        return self.changed(rounding([self.site], format), value)

    def changed(self, calls: Calls, value: Tensor | None = None) -> Losses:
        """The losses with other functions for some nodes, and another weight at the site."""
        rows: list[Tensor] = []
        for values in self.states:
            now = dict(values)
            for segment in self.running.segments[self.place :]:
                weights = segment.read_weights(self.running.graph)
                if value is not None and self.site.node in weights:
                    weights[self.site.node] = value
                segment.run(now, weights, calls=calls)
            rows.append(loss_target(self.measured.graph).rows(now))
        return self.measured.losses(rows)


@functools.cache
def rounding_key(format: Format) -> str:
    """What a format makes of a weight: the digest of how it rounds one."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    rounded, read = dequantized(weight, format), round_to_int8(weight, format.block)
    return f"{format.bits}/{format.block} {(digest(rounded) + digest(read)).hex()[48:80]}"


def rounding(sites: Iterable[Site], format: Format) -> Calls:
    """Linear layers that round their input as a kernel with 8-bit activations does."""

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        return functional.linear(round_to_int8(input, format.block), weight, bias)

    readers = [reader for site in sites for reader in site.readers]
    return {reader: linear for reader in readers if reader.target is aten.linear.default}


def plan_losses(measured: Measured, plan: Mapping[str, Format]) -> Losses:
    """The losses with all weights of a plan rounded at once."""
    graph = measured.graph
    sites = {site.weight: site for site in find_sites(graph)}
    key = (
        "plan "
        + hashlib.sha256(
            json.dumps([[name, rounding_key(f)] for name, f in sorted(plan.items())]).encode()
        ).hexdigest()
    )
    target = loss_target(graph)

    def measure() -> Losses:
        values = {
            sites[n].node: dequantized(graph.weight(sites[n].node), f) for n, f in plan.items()
        }
        running = program(graph, [n for n in (target.node, target.mask) if n is not None])
        states = [running.start(batch) for batch in measured.batches]
        calls = rounding((sites[n] for n in plan), next(iter(plan.values())))
        for segment in running.segments:
            weights = segment.read_weights(graph)
            weights = {node: values.get(node, value) for node, value in weights.items()}
            for state in states:
                segment.run(state, weights, calls=calls)
        return measured.losses(target.rows(state) for state in states)

    return measured.of(key, measure)


# ---- blocks and branches ------------------------------------------------------------------


def droppable(graph: Graph, level: Level) -> list[str]:
    """Names of the parts that can go."""
    return [part.name for part in parts_of(graph, level) if part.droppable]


def without(graph: Graph, level: Level, names: Iterable[str]) -> Graph:
    """A copy of the model without some parts."""
    gone, edited = set(names), graph.copy()
    chosen = [part for part in parts_of(edited, level) if part.name in gone]
    branches: list[Sublayer] = []
    for part in chosen:
        branches += [part] if isinstance(part, Sublayer) else part.sublayers
    drop(edited, Analyses(edited), branches, sorted(gone))
    return edited


def drop_losses(measured: Measured, level: Level, names: Iterable[str]) -> Losses:
    """The losses without some parts, all at once."""
    gone = sorted(set(names))
    key = f"without {level} {json.dumps(gone)}"

    def measure() -> Losses:
        return measured.losses(outputs(without(measured.graph, level, gone), measured.batches))

    return measured.of(key, measure)
