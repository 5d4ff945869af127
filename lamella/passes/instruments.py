"""What watches a pipeline: verification, progress, timing, dumps.

An instrument sees every pass before and after it runs, and when it fails. The numeric check has
a module of its own, `lamella.passes.numerics`.
"""

from __future__ import annotations

import abc
import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import yaml
from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

from lamella.ir.graph import Graph
from lamella.ir.verify import verify
from lamella.passes.base import Analyses, Transform
from lamella.rendering import seconds_text
from lamella.report import Loss

logger = logging.getLogger(__name__)


@dataclass
class Step:
    """One pass of a running pipeline.

    Attributes:
        graph: The graph that is edited.
        original: The graph before the first pass.
        pipeline: All passes.
        index: Which of them runs.
        analyses: The analyses of the graph, with the samples.
        seconds: Time of the pass, once it ran.
        edits: How often it edited the graph, once it ran.
        deviation: Error against the graph before the pass, if an instrument measured it.
        loss: Loss against the original, if an instrument measured it.
    """

    graph: Graph
    original: Graph
    pipeline: Sequence[Transform]
    index: int
    analyses: Analyses
    seconds: float = 0.0
    edits: int = 0
    deviation: float | None = None
    loss: Loss | None = None

    @property
    def transform(self) -> Transform:
        """The pass that runs."""
        return self.pipeline[self.index]


class Instrument(abc.ABC):
    """Watches the passes of a pipeline.

    An instrument must not edit the graph. An exception from a hook ends the pipeline like one
    from the pass.

    Attributes:
        books: The column of the report that the time of the hooks counts in.
    """

    books: ClassVar[Literal["verify", "check"]] = "verify"

    def before_pass(self, step: Step) -> None:
        """The pass is about to run."""
        return

    @abc.abstractmethod
    def after_pass(self, step: Step) -> None:
        """The pass has run and dead code is gone."""

    def failed(self, step: Step, error: BaseException) -> None:
        """The pass or an instrument raised; the graph is not yet restored."""
        return


class Verify(Instrument):
    """Checks the invariants of the graph after every pass."""

    def after_pass(self, step: Step) -> None:
        """Raise a `VerificationError` that lists every violation."""
        verify(step.graph)


class Timing(Instrument):
    """Logs the time of every pass; the report has it too."""

    def after_pass(self, step: Step) -> None:
        """Log one line."""
        logger.info("%s took %s", step.transform.spelling, seconds_text(step.seconds))


class Progress(Instrument):
    """A bar on the terminal: passes done, and how far the samples ran. Quiet elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on `console`, or on standard error."""
        self._console = console or Console(stderr=True)
        self._bars: Bars | None = None
        self._passes: TaskID | None = None
        self._samples: TaskID | None = None

    def before_pass(self, step: Step) -> None:
        """Show the name of the pass."""
        if not self._console.is_terminal:
            return
        if self._bars is None:
            self._bars = Bars(console=self._console, transient=True)
            self._bars.start()
            self._passes = self._bars.add_task("", total=len(step.pipeline))
            self._samples = self._bars.add_task("samples", total=None, visible=False)
            step.analyses.progress = self._ran
        self._bars.update(self._task(self._passes), description=step.transform.spelling)

    def after_pass(self, step: Step) -> None:
        """Advance, and remove the bar after the last pass."""
        if self._bars is None:
            return
        self._bars.advance(self._task(self._passes))
        self._bars.update(self._task(self._samples), visible=False)
        if step.index == len(step.pipeline) - 1:
            self._stop()

    def failed(self, step: Step, error: BaseException) -> None:
        """Remove the bar, so that the error is readable."""
        self._stop()

    def _ran(self, done: int, total: int) -> None:
        if self._bars is not None:
            task = self._task(self._samples)
            self._bars.update(task, completed=done, total=total, visible=done < total)

    def _task(self, task: TaskID | None) -> TaskID:
        assert task is not None
        return task

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None


class DumpOnFailure(Instrument):
    """Writes what is needed to look into a failure: graphs, recipe, error, digest of samples.

    The folder appears whole or not at all: it is written aside and renamed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Write one folder per failure below `folder`."""
        self._folder = Path(folder)
        self._before: Graph | None = None

    def before_pass(self, step: Step) -> None:
        """Keep the graph as it is (a copy shares the weights)."""
        self._before = step.graph.copy()

    def after_pass(self, step: Step) -> None:
        """Forget it after the last pass, so that replaced weights don't stay in memory."""
        if step.index == len(step.pipeline) - 1:
            self._before = None

    def failed(self, step: Step, error: BaseException) -> None:
        """Write the dump and name it in a note of the error."""
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".dump-", dir=self._folder))
        try:
            for name, text in self._texts(step, error).items():
                (aside / name).write_text(text, encoding="utf-8")
            final = self._free_name(f"failed-{step.index + 1}-{step.transform.name}")
            aside.replace(final)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        error.add_note(f"dumped to {final}")
        self._before = None

    def _texts(self, step: Step, error: BaseException) -> dict[str, str]:
        passes = [transform.spelling for transform in step.pipeline]
        samples = step.analyses.samples
        digest = samples.digest if samples is not None else "no samples"
        return {
            "before.txt": str(self._before) if self._before is not None else "",
            "after.txt": str(step.graph),
            "recipe.yaml": yaml.safe_dump({"version": 1, "passes": passes}, sort_keys=False),
            "samples.txt": f"{digest}\n",
            "error.txt": "".join(traceback.format_exception(error)),
        }

    def _free_name(self, name: str) -> Path:
        found, number = self._folder / name, 1
        while found.exists():
            number += 1
            found = self._folder / f"{name}-{number}"
        return found
