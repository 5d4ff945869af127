"""What every operation, block, branch and head contributes to the output, over the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import GraphError, SamplesError
from lamella.ir.graph import Graph
from lamella.passes.analyses.relevance_report import RelevanceReport
from lamella.passes.analyses.relevance_results import Totals, report_of
from lamella.passes.base import Analyses, Analysis
from lamella.passes.relevance import part_taps, taps
from lamella.passes.relevance.emit import LABEL, emit
from lamella.passes.relevance.request import Request, Tap
from lamella.passes.relevance.seeds import parse_seed
from lamella.rules.relevance.presets import Preset, preset_of

_TAPS: Mapping[str, Callable[[Graph], list[Tap]]] = {
    "operations": taps.operation_taps,
    "blocks": taps.block_taps,
    "sublayers": taps.sublayer_taps,
    "heads": taps.head_taps,
    "experts": part_taps.expert_taps,
    "channels": part_taps.channel_taps,
    "weights": part_taps.weight_taps,
    # What inputs get is computed in any case.
    "tokens": lambda graph: [],
    "pixels": lambda graph: [],
}


@dataclass(frozen=True)
class Relevance(Analysis[RelevanceReport]):
    """Layer-wise relevance propagation over the samples: one forward and one sweep each.

    Tokens that an attention mask hides start nothing. Amounts are summed in float64 in the order
    of the samples; how they are cut into batches makes no difference beyond rounding.

    Attributes:
        preset: Name of the rules, or a preset.
        seed: Where relevance starts: ``"logit"`` (the largest, at every position), ``"logit:7"``,
            ``"contrastive"``, ``"softmax"``, ``"difference:7,9"``.
        position: The only position of the output that counts; None means all.
        labels: The class of every row of the samples, which takes the place of the largest.
        output: Name of the output that is explained; "" means the first.
        taps: What is told: ``"operations"``, ``"blocks"``, ``"sublayers"``, ``"heads"``,
            ``"experts"``, ``"channels"`` (of hidden layers), ``"weights"`` (by row), ``"tokens"``
            (of every row of the samples), ``"pixels"`` (the mean over the rows).
        ledger: Whether to account for what is lost, by cause.
        checkpoint: ``"blocks"`` keeps the activations of one block at a time and runs the forward
            of each once more: less memory for more time.

    Raises:
        ValueError: The preset, the seed, a tap or the checkpoint is unknown.

    References:
        [Bach2015]; the rules of the presets have their own.
    """

    name: ClassVar[str] = "relevance"

    preset: str | Preset = "cp"
    seed: str = "logit"
    position: int | None = None
    labels: tuple[int, ...] = ()
    output: str = ""
    taps: tuple[str, ...] = ("operations", "blocks", "sublayers", "heads")
    ledger: bool = False
    checkpoint: str = ""

    def __post_init__(self) -> None:
        preset_of(self.preset)
        parse_seed(self.seed)
        Request(checkpoint=self.checkpoint)
        unknown = [name for name in self.taps if name not in _TAPS]
        if unknown:
            raise ValueError(f"unknown taps {', '.join(unknown)}; known are {', '.join(_TAPS)}")

    def run(self, graph: Graph, analyses: Analyses) -> RelevanceReport:
        """Emit the relevance graph and run the samples through it.

        Raises:
            SamplesError: There are no samples, or not as many labels as rows.
            MissingRuleError: Some operators have no rule.
            GraphError: The output doesn't depend on an input that relevance can be asked for, or
                no input holds the tokens or pixels that are asked for.
        """
        samples = analyses.need_samples()
        kept = _Kept(graph, self.taps)
        made = emit(graph, preset_of(self.preset), self._request(graph))
        rows = 0
        for sample in samples:
            given, count = self._with_labels(sample, graph, rows)
            kept.add(made(**given))
            rows += count
        if self.labels and rows != len(self.labels):
            raise SamplesError(f"there are {len(self.labels)} labels for {rows} rows of samples")
        if not rows:
            raise SamplesError("there are no samples; give at least one input dict")
        means = {name: total / rows for name, total in kept.totals.items()}
        found = report_of(graph, made, means, self._named(rows))
        # Masks and the like are integers that have no relevance.
        tokens = {name: rows for name, rows in kept.tokens.items() if name in made.sources}
        return dataclasses.replace(found, tokens=tokens)

    def _named(self, rows: int) -> tuple[str, int]:
        return preset_of(self.preset).name, rows

    def _request(self, graph: Graph) -> Request:
        wanted: list[Tap] = []
        for name in self.taps:
            wanted += _TAPS[name](graph)
        if not wanted:
            # What there was to distribute is told in any case, and comes with taps only.
            wanted.append(Tap("output", (graph.outputs[0].name,), taps.amounts_of))
        seed = parse_seed(self.seed, self.position)
        output = self.output or 0
        return Request(
            output,
            seed,
            label=bool(self.labels),
            taps=tuple(wanted),
            ledger=self.ledger,
            checkpoint=self.checkpoint,
        )

    def _with_labels(
        self, sample: Mapping[str, Any], graph: Graph, start: int
    ) -> tuple[dict[str, Any], int]:
        """The inputs by name, and how many rows they have."""
        flat = graph.signature.flatten((), sample)
        given: dict[str, Any] = dict(zip(graph.signature.inputs, flat, strict=True))
        first = next(value for value in flat if isinstance(value, Tensor) and value.ndim)
        count = len(first)
        if self.labels:
            labels = self.labels[start : start + count]
            if len(labels) != count:
                raise SamplesError(
                    f"there are {len(self.labels)} labels, and more rows of samples than that"
                )
            given[LABEL] = torch.tensor(labels)
        return given, count


class _Kept:
    """What is kept of the batches, in their order.

    Attributes:
        totals: Name of an output of the relevance graph -> its sum; of the relevance of inputs
            flow and mass, and ``"pixels.<input>"``.
        tokens: Name of an input -> the relevance of the tokens of each row.
    """

    def __init__(self, graph: Graph, wanted: tuple[str, ...]) -> None:
        self.totals: Totals = {}
        self.tokens: dict[str, list[tuple[float, ...]]] = {}
        self._images: frozenset[str] = frozenset()
        inputs = dict(zip(graph.signature.inputs, graph.inputs, strict=True))
        if "tokens" in wanted:
            self.tokens = {name: [] for name in _like(inputs, "tokens", _holds_tokens)}
        if "pixels" in wanted:
            self._images = frozenset(_like(inputs, "pixels", _holds_pixels))

    def add(self, found: Mapping[str, Tensor]) -> None:
        """Add what one batch gave."""
        for name, value in found.items():
            if name.startswith("relevance."):
                self._add_input(name.removeprefix("relevance."), value.double())
            elif name == "start" or name.startswith(("tap.", "ledger.")):
                self._add(name, value.double())

    def _add_input(self, name: str, relevance: Tensor) -> None:
        self._add(f"relevance.{name}", torch.stack((relevance.sum(), relevance.abs().sum())))
        if name in self.tokens and relevance.ndim > 2:
            self.tokens[name] += [tuple(row) for row in relevance.flatten(2).sum(-1).tolist()]
        if name in self._images:
            maps = relevance.sum(1)
            self._add(f"pixels.{name}", torch.stack((maps.sum(0), maps.abs().sum(0))))

    def _add(self, name: str, amounts: Tensor) -> None:
        before = self.totals.get(name)
        if before is not None and before.shape != amounts.shape:
            raise SamplesError(
                f"the samples have images of {list(before.shape[1:])} and "
                f"{list(amounts.shape[1:])} pixels, whose relevance has no mean"
            )
        self.totals[name] = amounts if before is None else before + amounts


def _like(inputs: Mapping[str, Node], what: str, holds: Callable[[Tensor], bool]) -> list[str]:
    """The inputs that hold what is asked for."""
    values = {n: v for n, node in inputs.items() if isinstance(v := node.meta.get("val"), Tensor)}
    found = [name for name, value in values.items() if holds(value)]
    if not found:
        listed = ", ".join(f"{name} ({v.dtype}, {v.ndim} axes)" for name, v in values.items())
        raise GraphError(f"no input holds {what} whose relevance is asked for; there are {listed}")
    return found


def _holds_tokens(value: Tensor) -> bool:
    return not value.is_floating_point() and value.ndim == 2


def _holds_pixels(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim == 4
