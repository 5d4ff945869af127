"""Whether a pass kept its promise about the outputs of the model.

An exact pass is compared with the graph before it, a lossy one with the original. Without
samples both run on made-up inputs (see `lamella.passes.probes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lamella.data import Batch, Samples
from lamella.errors import LossError, NumericError, PassError
from lamella.ir.graph import Graph
from lamella.ir.runner import run_outputs
from lamella.passes.base import Effect
from lamella.passes.instruments import Instrument, Step
from lamella.passes.loss import LossMeter, comparisons, deviation
from lamella.passes.probes import flat_inputs, probe_samples
from lamella.report import Loss

EXACT: Mapping[torch.dtype, float] = MappingProxyType(
    {
        torch.float64: 1e-9,
        torch.float32: 1e-4,
        torch.float16: 3e-2,
        torch.bfloat16: 2e-1,
    }
)
"""Largest error of an exact pass, relative to the largest entry of the output.

About a thousand roundings: another order of summation moves every intermediate value by a few
roundings, and dozens of layers add them up.
"""

ROUNDING = 5e-2
"""The same for a pass that rounds intermediate values, in any dtype: weights in 16 bits move the
outputs of the zoo by less than a hundredth, a wrong scale by more than a tenth."""

Outputs = dict[str, Any]


class NumericCheck(Instrument):
    """Compares the outputs before and after every pass, by what the pass promises.

    The outputs of the original are kept for the batches that the loss is measured on, at most
    `memory_bytes` of them. A pass that promises to keep the outputs is compared on the first
    batch of the samples, or on all made-up ones, which are small.
    """

    books: ClassVar[Literal["verify", "check"]] = "check"

    def __init__(
        self,
        *,
        max_loss: float | None = None,
        batches: int = 8,
        seed: int = 0,
        memory_bytes: int = 1 << 29,
    ) -> None:
        """Allow `max_loss` at most, measured on the first `batches` of the samples.

        Raises:
            ValueError: `max_loss` is negative or not a number, or `batches` is less than 1.
        """
        if max_loss is not None and not max_loss >= 0:
            raise ValueError(f"max_loss must be 0 or more, got {max_loss}")
        if batches < 1:
            raise ValueError(f"the loss needs at least one batch, got {batches}")
        self._max_loss = max_loss
        self._batches = batches
        self._seed = seed
        self._memory_bytes = memory_bytes
        self._start()

    def before_pass(self, step: Step) -> None:
        """Run the graph before a pass that promises to keep its outputs."""
        if step.index == 0:
            self._start()
        if self._probes is None and not self._why_not:
            self._find_probes(step)
        if self._probes is not None and step.transform.effect is not Effect.LOSSY:
            self._outputs_now(step)

    def after_pass(self, step: Step) -> None:
        """Compare.

        Raises:
            NumericError: The pass did not keep the outputs, or they hold NaN or Inf now.
            LossError: The loss is larger than allowed.
        """
        is_lossy = step.transform.effect is Effect.LOSSY
        if self._probes is None:
            self._not_compared(step, is_lossy)
        elif step.edits and is_lossy:
            step.loss = self._loss(step, self._probes)
            self._check_loss(step.transform.spelling, step.loss)
        elif step.edits:
            before = self._outputs_now(step)
            self._current = []
            after = self._outputs_now(step)
            step.deviation = _compared(before, after, step.transform.effect)
        if step.index == len(step.pipeline) - 1:
            self._start()

    def _start(self) -> None:
        """Forget the last pipeline."""
        self._probes: Samples | None = None
        self._why_not = ""
        self._original: list[Outputs] = []
        self._current: list[Outputs] = []

    def _find_probes(self, step: Step) -> None:
        lacking = [node for node in step.graph.weight_nodes() if not _has_data(step.graph, node)]
        if lacking:
            self._why_not = f"weight {lacking[0].target!r} has no data"
        elif step.analyses.samples is not None:
            self._probes = step.analyses.samples.take(self._batches)
        else:
            self._probes = probe_samples(step.graph, seed=self._seed)

    def _not_compared(self, step: Step, is_lossy: bool) -> None:
        if is_lossy and self._max_loss is not None:
            raise PassError(f"max_loss can't be checked: {self._why_not}")
        step.analyses.note(f"outputs were not compared: {self._why_not}")

    def _outputs_now(self, step: Step) -> list[Outputs]:
        """The outputs of the graph as it is, on the batches for exact passes."""
        assert self._probes is not None
        if not self._current:
            batches = self._probes.batches[: _compared_batches(step)]
            self._current = [outputs_of(step.graph, batch) for batch in batches]
        return self._current

    def _loss(self, step: Step, probes: Samples) -> Loss:
        meter = LossMeter(comparisons(step.original))
        self._current = []
        kept_bytes = sum(map(_bytes_of, self._original))
        for index, batch in enumerate(probes):
            if index < len(self._original):
                before = self._original[index]
            else:
                before = outputs_of(step.original, batch)
                kept_bytes += _bytes_of(before)
                if kept_bytes <= self._memory_bytes:
                    self._original.append(before)
            after = outputs_of(step.graph, batch)
            if index < _compared_batches(step):
                self._current.append(after)
            _check_finite(before, after)
            meter.add(flat_inputs(step.original, batch), before, after)
        return meter.result("probes" if step.analyses.samples is None else "samples")

    def _check_loss(self, spelling: str, loss: Loss) -> None:
        if self._max_loss is not None and not loss.value <= self._max_loss:
            raise LossError(
                f"{spelling!r} costs {loss}, allowed is a loss of {self._max_loss:g}; "
                f"ask for less, or raise max_loss"
            )


def _compared_batches(step: Step) -> int:
    """How many batches an exact pass is compared on: samples are large, made-up inputs small."""
    return 2 if step.analyses.samples is None else 1


def outputs_of(graph: Graph, batch: Batch) -> Outputs:
    """The tensors that `graph` gives for a batch, by name; weights not in memory are streamed."""
    values = flat_inputs(graph, batch)
    if all(graph.is_loaded(node) for node in graph.weight_nodes()):
        flat = graph.run(values)
    else:
        named = dict(zip(graph.signature.inputs, values, strict=True))
        flat = run_outputs(graph, [named])[0]
    pairs = zip(graph.signature.outputs, flat, strict=True)
    return {name: value for name, value in pairs if isinstance(value, Tensor)}


def _compared(before: list[Outputs], after: list[Outputs], effect: Effect) -> float:
    """The largest deviation of an output.

    Raises:
        NumericError: It is larger than the effect allows, or an output is gone.
    """
    worst = 0.0
    for was, now in zip(before, after, strict=True):
        for name, value in was.items():
            if name not in now:
                raise NumericError(f"the pass is {effect.value} but took away output {name!r}")
            error = deviation(value, now[name])
            allowed = _allowed(value.dtype, effect)
            if not error <= allowed:
                raise NumericError(
                    f"the pass is {effect.value} but changed output {name!r} by {error:.2g} of "
                    f"its largest entry (allowed is {allowed:g})"
                )
            worst = max(worst, error)
    return worst


def _allowed(dtype: torch.dtype, effect: Effect) -> float:
    exact = EXACT.get(dtype, 0.0)
    return exact if effect is Effect.EXACT else max(exact, ROUNDING)


def _check_finite(before: Outputs, after: Outputs) -> None:
    for name, value in after.items():
        was = before.get(name)
        if was is None or not value.is_floating_point() or was.shape != value.shape:
            continue
        new = ~value.isfinite() & was.isfinite()
        if bool(new.any()):
            raise NumericError(
                f"output {name!r} holds NaN or Inf in {int(new.sum())} of {value.numel()} entries "
                f"that were finite before"
            )


def _has_data(graph: Graph, node: Any) -> bool:
    if graph.is_loaded(node):
        return True
    return graph.source is not None and str(node.target) in graph.source.names()


def _bytes_of(outputs: Outputs) -> int:
    return sum(value.numel() * value.element_size() for value in outputs.values())
