"""``lamella bench``: latency and size of artifacts, side by side in one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lamella.cli.console import Stages, errors_in_one_line, out, show_json
from lamella.cli.lazy import api, inputs
from lamella.rendering import bytes_text, seconds_text
from lamella.timing import Timing, measure

if TYPE_CHECKING:
    from lamella.backends.base import Executable


@errors_in_one_line()
def bench_artifacts(
    artifacts: Annotated[
        list[Path], typer.Argument(help="Folders written by compile.", show_default=False)
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The original, run by PyTorch (eager).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch of the inputs.")] = 1,
    sequence: Annotated[int, typer.Option(min=1, help="Sequence of the inputs.")] = 128,
    rounds: Annotated[int, typer.Option(min=2, help="Timed calls of each.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compare artifacts, taking turns (A B C A B C …); medians are shown."""
    with Stages() as stage:
        stage("loading")
        contenders = _contenders(artifacts, model)
        calls = {name: _call(one, batch, sequence) for name, one in contenders.items()}
        stage("timing")
        timings = measure(calls, rounds=rounds)
    if as_json:
        show_json([_data(name, contenders[name], timings[name]) for name in contenders])
        return
    out.print(_table(contenders, timings, f"batch {batch}, sequence {sequence}, {rounds} rounds"))


def _contenders(artifacts: list[Path], model: str | None) -> dict[str, Executable]:
    """What is timed, by name; the original first."""
    contenders: dict[str, Executable] = {}
    # Artifacts first: they are checked in no time, and a model may take long to read.
    loaded = {str(folder): api.load(folder) for folder in artifacts}
    if model is not None:
        contenders[f"{Path(model).name} (original)"] = api.lower(api.capture(model), "eager")
    return contenders | loaded


def _call(executable: Executable, batch: int, sequence: int) -> Callable[[], object]:
    """A call with inputs of the given sizes, made beforehand."""
    values = inputs.example_inputs(executable.inputs, batch=batch, sequence=sequence)
    return lambda: executable.run(values)


def _table(contenders: dict[str, Executable], timings: dict[str, Timing], title: str) -> Table:
    table = Table(box=None, title=title, title_justify="left")
    table.add_column("artifact")
    table.add_column("backend")
    for column in ("files", "weights", "median", "best", "spread", "relative"):
        table.add_column(column, justify="right")
    first = next(iter(timings.values())).median_seconds
    for name, executable in contenders.items():
        timing = timings[name]
        table.add_row(
            name,
            executable.backend,
            bytes_text(executable.file_bytes),
            bytes_text(executable.weight_bytes),
            seconds_text(timing.median_seconds),
            seconds_text(timing.best_seconds),
            f"{timing.spread_ratio:.0%}",
            f"{timing.median_seconds / first:.2f}x",
        )
    return table


def _data(name: str, executable: Executable, timing: Timing) -> dict[str, Any]:
    return {
        "artifact": name,
        "backend": executable.backend,
        "file_bytes": executable.file_bytes,
        "weight_bytes": executable.weight_bytes,
        **dataclasses.asdict(timing),
    }
