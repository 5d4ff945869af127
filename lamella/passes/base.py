"""What a pass is: a transform edits a graph, an analysis answers a question about it.

Both are frozen dataclasses whose fields are their options. `Analyses` hands out the results of
analyses: each is computed once for a state of the graph, and never given for another state.
"""

from __future__ import annotations

import abc
import contextlib
import enum
from collections.abc import Generator, Iterable, Mapping
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor

from lamella.data import Samples
from lamella.errors import GIVE_SAMPLES, PassError, SamplesError
from lamella.ir.graph import Graph
from lamella.ir.runner import Progress, Request, run_requests
from lamella.passes.options import Option, described, spelling_of
from lamella.passes.times import Times

R = TypeVar("R")


class Effect(enum.Enum):
    """What a transform does to the outputs of the model; the manager checks it.

    `EXACT` leaves them as they are up to the rounding of another order of summation,
    `ROUNDING` may round intermediate values to a narrower type, `LOSSY` trades quality for
    something and has its loss measured.
    """

    EXACT = "exact"
    ROUNDING = "rounding"
    LOSSY = "lossy"


class Transform(abc.ABC):
    """An edit of a graph. Subclasses are frozen dataclasses; their fields are the options.

    Attributes:
        name: As in recipes and on the command line: ``"drop-blocks"``.
        effect: What the transform promises about the outputs.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]

    @abc.abstractmethod
    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Edit `graph` through its methods; dead code and checks are the manager's business."""

    @property
    def spelling(self) -> str:
        """The pass as text, ``"drop-blocks count=2 by=lim"``; it parses back to an equal pass."""
        return spelling_of(self)

    @classmethod
    def describe(cls) -> tuple[Option, ...]:
        """The options with their types, defaults and documentation."""
        return described(cls)


class Analysis(abc.ABC, Generic[R]):
    """A question about a graph. Subclasses are frozen dataclasses, and so their own cache key.

    Attributes:
        name: As in recipes and on the command line: ``"cost"``.
    """

    name: ClassVar[str]

    def requests(self, graph: Graph) -> tuple[Request, ...]:
        """The statistics of `graph` that `run` will ask `Analyses.statistics` for.

        They are declared beforehand so that several analyses share one run of the samples.
        """
        return ()

    @abc.abstractmethod
    def run(self, graph: Graph, analyses: Analyses) -> R:
        """The answer, a frozen report. Never edits `graph`."""

    @property
    def spelling(self) -> str:
        """The analysis as text; it parses back to an equal analysis."""
        return spelling_of(self)

    @classmethod
    def describe(cls) -> tuple[Option, ...]:
        """The options with their types, defaults and documentation."""
        return described(cls)


@contextlib.contextmanager
def gradients_possible() -> Generator[None]:
    """Let what runs inside differentiate, even where the caller has switched gradients off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


class Analyses:
    """The results of analyses of one graph, each computed once per state of the graph.

    Attributes:
        samples: Calibration inputs, or None.
        strict: Whether a fallback is an error instead of a remark.
        progress: Told how much of a run of the samples is done, or None.
        times: Who knows what kernels take, or None.
    """

    def __init__(
        self, graph: Graph, samples: Samples | None = None, *, strict: bool = False
    ) -> None:
        """Answers about `graph`, with `samples` for the analyses that need data."""
        self.graph = graph
        self.samples = samples
        self.strict = strict
        self.progress: Progress | None = None
        self.times: Times | None = None
        self._results: dict[Analysis[Any], Any] = {}
        self._statistics: dict[Request, Tensor] = {}
        self._state = graph.edits
        self._asking: list[str] = []
        self._remarks: list[str] = []

    def get(self, analysis: Analysis[R]) -> R:
        """The answer of `analysis` for the graph as it is now.

        The key is the analysis with its options, the edit count of the graph and the digest of
        the samples, so a stale answer is never given.

        Raises:
            PassError: The analysis edited the graph.
        """
        self._forget_stale()
        if analysis in self._results:
            return cast(R, self._results[analysis])
        before = self.graph.edits
        self._asking.append(analysis.name)
        try:
            with gradients_possible():
                result = analysis.run(self.graph, self)
        except Exception as error:
            error.add_note(f"in analysis {spelling_of(analysis)!r}")
            raise
        finally:
            self._asking.pop()
        if self.graph.edits != before:
            raise PassError(
                f"analysis {analysis.name!r} edited the graph "
                f"({self.graph.edits - before} edits); an analysis only looks, make it a transform"
            )
        self._results[analysis] = result
        return result

    def get_all(self, *analyses: Analysis[Any]) -> tuple[Any, ...]:
        """The answers of several analyses; the samples run once for all of them."""
        self._forget_stale()
        wanted = [
            request
            for analysis in analyses
            if analysis not in self._results
            for request in analysis.requests(self.graph)
        ]
        if wanted:
            self.statistics(wanted)
        return tuple(self.get(analysis) for analysis in analyses)

    def supply(self, analysis: Analysis[R], result: R) -> None:
        """Keep the answer of another analysis that was found on the way to one's own."""
        self._forget_stale()
        self._results.setdefault(analysis, result)

    def statistics(self, requests: Iterable[Request]) -> Mapping[Request, Tensor]:
        """Statistics of the samples; what is known is not computed again.

        Raises:
            SamplesError: There are no samples.
        """
        self._forget_stale()
        wanted = list(dict.fromkeys(requests))
        missing = [request for request in wanted if request not in self._statistics]
        if missing:
            samples = self.need_samples()
            found = run_requests(self.graph, samples, missing, progress=self.progress)
            self._statistics.update(found)
        return {request: self._statistics[request] for request in wanted}

    def need_samples(self) -> Samples:
        """The samples.

        Raises:
            SamplesError: There are none; the message names the analysis that asks.
        """
        if self.samples is None:
            who = f"analysis {self._asking[-1]!r}" if self._asking else "this pass"
            raise SamplesError(f"{who} needs data; {GIVE_SAMPLES}")
        return self.samples

    def remark(self, text: str) -> None:
        """Report that something was skipped or done another way than asked for.

        Raises:
            PassError: The compilation is strict.
        """
        if self.strict:
            raise PassError(f"{text} (an error because strict=True)")
        self._remarks.append(text)

    def note(self, text: str) -> None:
        """Report something that is as asked for: what was chosen, what was found."""
        self._remarks.append(text)

    def take_remarks(self) -> tuple[str, ...]:
        """The remarks and notes since the last call, in order."""
        taken, self._remarks = tuple(dict.fromkeys(self._remarks)), []
        return taken

    def _forget_stale(self) -> None:
        """Drop what was computed for another state: edit counts never come back."""
        if self.graph.edits != self._state:
            self._results.clear()
            self._statistics.clear()
            self._state = self.graph.edits
