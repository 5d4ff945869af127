"""Finds the pass, then the single edit, that broke something.

A check is any question about a graph: does it verify, does it give the same outputs, does it
still run on a backend. `bisect` asks it about graphs that were edited part of the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lamella.data import Batch, Samples
from lamella.errors import PassError, VerificationError
from lamella.ir.edits import Edit
from lamella.ir.graph import Graph
from lamella.ir.verify import verify
from lamella.passes.base import Analyses, Transform
from lamella.passes.loss import LossMeter, comparisons
from lamella.passes.numerics import outputs_of
from lamella.passes.probes import check_samples, flat_inputs, probe_samples

Check = Callable[[Graph], bool]


@dataclass(frozen=True)
class BisectReport:
    """Where a check first fails.

    Attributes:
        spelling: The pass that broke the check, or None if the check holds after all passes.
        index: Its place in the pipeline, from 0.
        edits: How many edits the pass made.
        number: Which of them broke the check, from 1; 0 if the check holds until dead code goes.
        edit: That edit: what was done, to which node and operator, by whom.
        error: Why the pass itself failed, if it did.
        evaluations: How often the check ran.
    """

    spelling: str | None
    index: int | None = None
    edits: int = 0
    number: int = 0
    edit: Edit | None = None
    error: str | None = None
    evaluations: int = 0

    def __str__(self) -> str:
        if self.spelling is None:
            return f"the check holds after all passes ({self.evaluations} evaluations)"
        where = f"pass {(self.index or 0) + 1}, {self.spelling!r}"
        what = f"edit {self.number} of {self.edits}: {self.edit}" if self.edit else "no single edit"
        failed = f" ({self.error})" if self.error else ""
        return f"{where}, {what}{failed}; {self.evaluations} evaluations"


def bisect(
    graph: Graph | Callable[[], Graph],
    passes: Iterable[Transform],
    check: Check,
    *,
    samples: Samples | Iterable[Batch] | None = None,
) -> BisectReport:
    """The pass and the edit after which `check` fails for the first time, by binary search.

    The passes run on copies; `graph` is left as it is. The check sees a graph without dead
    code. An exception from the check counts as a failure, because a half-edited graph may not
    run at all. A pass that moves a factor from one weight to another breaks the outputs in
    between: the edit that is found is *one* at which the check turns from true to false.

    Args:
        graph: The graph before the first pass, or what makes it.
        passes: The pipeline.
        check: True for a good graph.
        samples: For analyses that need data.

    Returns:
        Found with at most ``2 + log2(passes) + log2(edits)`` evaluations, logarithms rounded up.

    Raises:
        PassError: The check fails before the first pass.
    """
    start = graph.copy() if isinstance(graph, Graph) else graph()
    pipeline = tuple(passes)
    data = None if samples is None else Samples.of(samples)
    counted = _Counted(check)
    if not counted(start.copy()):
        raise PassError("the check fails before the first pass; there is nothing to search")
    states, error = _states(start, pipeline, data)
    done = len(states) - 1
    if done == 0 or counted(states[done].copy()):
        if error is None:
            return BisectReport(None, evaluations=counted.count)
        index = done
    else:
        index = _first_bad(0, done, lambda step: counted(states[step].copy())) - 1
        error = None
    return _search_edits(_Suspect(states[index], pipeline[index], index, error), data, counted)


def verifies(graph: Graph) -> bool:
    """A check: the graph breaks no invariant."""
    try:
        verify(graph)
    except VerificationError:
        return False
    return True


def within_loss(
    original: Graph, max_loss: float, samples: Samples | Iterable[Batch] | None = None
) -> Check:
    """A check: the loss against `original` is at most `max_loss`.

    Args:
        original: The graph before the first pass; its outputs are computed once.
        max_loss: In the unit of `Loss.value`.
        samples: What to measure on; made-up inputs without them.

    Raises:
        SamplesError: The samples don't fit the graph.
    """
    original = original.copy()
    probes = probe_samples(original) if samples is None else Samples.of(samples)
    check_samples(probes, original)
    compared = comparisons(original)
    expected = [outputs_of(original, batch) for batch in probes]

    def check(graph: Graph) -> bool:
        meter = LossMeter(compared)
        for batch, before in zip(probes, expected, strict=True):
            meter.add(flat_inputs(original, batch), before, outputs_of(graph, batch))
        return meter.result("probes").value <= max_loss

    return check


@dataclass
class _Counted:
    """A check that counts, and for which a graph that can't be asked is a bad one."""

    check: Check
    count: int = 0

    def __call__(self, graph: Graph) -> bool:
        self.count += 1
        try:
            return bool(self.check(graph))
        except Exception:
            return False


@dataclass(frozen=True)
class _Suspect:
    """A pass, the graph before it, and its own error if it raised one."""

    before: Graph
    transform: Transform
    index: int
    error: Exception | None


def _states(
    start: Graph, pipeline: Sequence[Transform], samples: Samples | None
) -> tuple[list[Graph], Exception | None]:
    """The graph before the first pass and after each, up to one that raises."""
    states = [start]
    for transform in pipeline:
        graph = states[-1].copy()
        try:
            _run(graph, transform, samples)
        except Exception as error:
            return states, error
        states.append(graph)
    return states, None


def _run(graph: Graph, transform: Transform, samples: Samples | None) -> int:
    """Run a pass without checks; the number of its edits."""
    before = graph.edits
    with graph.author(transform.name):
        transform.run(graph, Analyses(graph, samples))
    edits = graph.edits - before
    graph.finish()
    return edits


def _search_edits(suspect: _Suspect, samples: Samples | None, check: _Counted) -> BisectReport:
    """The edit of a pass at which the check turns."""
    edits = _count_edits(suspect, samples)

    def after(number: int) -> Graph:
        graph = suspect.before.copy()
        with graph.author(suspect.transform.name), graph.stop_after(number):
            suspect.transform.run(graph, Analyses(graph, samples))
        return graph

    number, edit = edits, None
    if edits:
        if suspect.error is None:
            number = _first_bad(0, edits, lambda n: check(_finished(after(n))))
        edit = after(number).last_edit
    error = None if suspect.error is None else f"{type(suspect.error).__name__}: {suspect.error}"
    spelling = suspect.transform.spelling
    return BisectReport(spelling, suspect.index, edits, number, edit, error, check.count)


def _count_edits(suspect: _Suspect, samples: Samples | None) -> int:
    graph = suspect.before.copy()
    before = graph.edits
    try:
        return _run(graph, suspect.transform, samples)
    except Exception:
        if suspect.error is None:
            raise
        return graph.edits - before


def _finished(graph: Graph) -> Graph:
    graph.finish()
    return graph


def _first_bad(good: int, bad: int, check: Callable[[int], bool]) -> int:
    """The smallest step between a good and a bad place, by halving."""
    while bad - good > 1:
        middle = (good + bad) // 2
        if check(middle):
            good = middle
        else:
            bad = middle
    return bad
