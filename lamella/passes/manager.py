"""Runs a pipeline of transforms, checks each step and keeps the books.

Either all passes succeed, or the graph is what it was before the first.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any, cast

import torch

from lamella.data import Batch, Samples
from lamella.errors import LossError
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.passes.base import Analyses, Transform, gradients_possible
from lamella.passes.instruments import Instrument, Step, Verify
from lamella.passes.numerics import NumericCheck
from lamella.passes.options import options_of, plain
from lamella.passes.probes import check_samples
from lamella.report import ModelSummary, PassRecord, Report


def run_passes(
    graph: Graph,
    passes: Iterable[Transform],
    *,
    samples: Samples | Iterable[Batch] | None = None,
    max_loss: float | None = None,
    strict: bool = False,
    instruments: Sequence[Instrument] = (),
) -> Report:
    """Edit `graph` by `passes`, in order, and report what each did.

    After every pass dead code goes, the invariants are verified, and the outputs are compared:
    an exact or rounding pass must keep them, the loss of a lossy one is measured against the
    graph before the first pass.

    Args:
        graph: Edited in place; on any failure it is what it was before.
        passes: Transforms; text is parsed by `lamella.recipe.parse_passes`.
        samples: Calibration inputs, which also serve to measure loss; without them the outputs
            are compared on made-up inputs.
        max_loss: Largest loss against the original, in the unit of `Loss.value`.
        strict: Whether skipping a layer is an error.
        instruments: More watchers. A `NumericCheck` or `Verify` among them takes the place of
            the standard one.

    Raises:
        SamplesError: The samples don't fit the graph.
        VerificationError: A pass broke an invariant.
        NumericError: A pass did not keep its promise about the outputs.
        LossError: A pass cost more than `max_loss`.
    """
    pipeline = _transforms(passes)
    watching = _instruments(instruments, max_loss)
    prepared = None if samples is None else Samples.of(samples)
    if prepared is not None:
        check_samples(prepared, graph)
    analyses = Analyses(graph, prepared, strict=strict)
    original = graph.copy()
    report = _report_of(original, prepared)
    records: list[PassRecord] = []
    try:
        for index in range(len(pipeline)):
            step = Step(graph, original, pipeline, index, analyses)
            records.append(_run_step(step, watching))
    except BaseException:
        graph.restore(original)
        raise
    return report.extended(passes=tuple(records))


def _run_step(step: Step, instruments: Sequence[Instrument]) -> PassRecord:
    clock = _Clock()
    edits = step.graph.edits
    try:
        clock.tell(instruments, lambda one: one.before_pass(step))
        before = clock.verify(lambda: _Books.of(step.graph))
        with step.graph.author(step.transform.name), gradients_possible():
            step.seconds = clock.seconds_of(lambda: step.transform.run(step.graph, step.analyses))
        step.edits = step.graph.edits - edits
        clock.verify(step.graph.finish)
        clock.tell(instruments, lambda one: one.after_pass(step))
        after = clock.verify(lambda: _Books.of(step.graph))
    except BaseException as error:
        _add_notes(error, step, edits)
        _tell_failure(instruments, step, error)
        raise
    return _record(step, clock, before, after)


def _record(step: Step, clock: _Clock, before: _Books, after: _Books) -> PassRecord:
    transform = step.transform
    return PassRecord(
        name=transform.name,
        options=plain(options_of(transform)),
        effect=transform.effect.value,
        seconds=step.seconds,
        verify_seconds=clock.booked["verify"],
        check_seconds=clock.booked["check"],
        nodes_before=before.operators.total(),
        nodes_after=after.operators.total(),
        weight_bytes_before=before.weight_bytes,
        weight_bytes_after=after.weight_bytes,
        operators_removed=dict(before.operators - after.operators),
        operators_added=dict(after.operators - before.operators),
        edits=step.edits,
        deviation=step.deviation,
        loss=step.loss,
        remarks=step.analyses.take_remarks(),
        spelling=transform.spelling,
    )


def _tell_failure(instruments: Sequence[Instrument], step: Step, error: BaseException) -> None:
    for instrument in instruments:
        try:
            instrument.failed(step, error)
        except OSError as other:  # a full disk must not hide what went wrong
            error.add_note(f"{type(instrument).__name__} failed as well: {other}")


def _add_notes(error: BaseException, step: Step, edits: int) -> None:
    """Name the pass, and the node and operator that it edited last.

    A loss is that of all edits: the last one says nothing about it.
    """
    place = f"pass {step.index + 1} of {len(step.pipeline)}"
    error.add_note(f"in {place}: {step.transform.spelling!r}")
    last = step.graph.last_edit
    if isinstance(error, LossError) or last is None:
        return
    if step.graph.edits > edits and last.author == step.transform.name:
        error.add_note(f"its last edit: {last}")


@dataclasses.dataclass(frozen=True)
class _Books:
    """What is written down of a graph before and after a pass."""

    operators: Counter[str]
    weight_bytes: int

    @classmethod
    def of(cls, graph: Graph) -> _Books:
        kinds = {"call_function": None, "get_attr": "weight", "placeholder": "input"}
        names = (kinds.get(node.op, node.op) or ops.op_name(node.target) for node in graph.nodes)
        return cls(Counter(names), graph.weight_bytes())


class _Clock:
    """Time by the column of the report it counts in."""

    def __init__(self) -> None:
        self.booked = {"verify": 0.0, "check": 0.0}

    def seconds_of(self, action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def verify(self, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = action()
        self.booked["verify"] += time.perf_counter() - start
        return result

    def tell(self, instruments: Sequence[Instrument], hook: Callable[[Instrument], None]) -> None:
        for instrument in instruments:
            self.booked[instrument.books] += self.seconds_of(lambda one=instrument: hook(one))


def _transforms(passes: Iterable[Transform]) -> tuple[Transform, ...]:
    found = tuple(cast(Iterable[Any], passes))
    for index, one in enumerate(found):
        if not isinstance(one, Transform):
            kind = type(one).__name__
            raise TypeError(
                f"pass {index + 1} is a {kind}, not a Transform; text and mappings are parsed by "
                f"lamella.recipe.parse_passes"
            )
    return found


def _instruments(given: Sequence[Instrument], max_loss: float | None) -> tuple[Instrument, ...]:
    """The standard instruments first, unless one of their kind is given."""
    standard: list[Instrument] = []
    if not any(isinstance(one, Verify) for one in given):
        standard.append(Verify())
    if not any(isinstance(one, NumericCheck) for one in given):
        standard.append(NumericCheck(max_loss=max_loss))
    elif max_loss is not None:
        raise ValueError("give max_loss either to run_passes or to its NumericCheck")
    return (*standard, *given)


def _report_of(graph: Graph, samples: Samples | None) -> Report:
    return Report(
        model=ModelSummary(
            name=graph.origin.architecture,
            nodes=len(graph.nodes),
            weight_bytes=graph.weight_bytes(),
            inputs=graph.signature.inputs,
            outputs=graph.signature.outputs,
        ),
        versions={
            "lamella": metadata.version("lamella"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        samples_digest=None if samples is None else samples.digest,
        samples=0 if samples is None else len(samples),
    )
