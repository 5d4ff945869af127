"""``lamella bench``: latency and size of artifacts, side by side in one run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lamella import memory
from lamella.cli.console import Stages, errors_in_one_line, out, show_json, table_of
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
        contenders = _contenders(artifacts, model, (batch, sequence))
        calls = {name: each.call for name, each in contenders.items()}
        stage("timing")
        timings = measure(calls, rounds=rounds)
    if as_json:
        show_json([_data(name, contenders[name], timings[name]) for name in contenders])
        return
    out.print(_table(contenders, timings, f"batch {batch}, sequence {sequence}, {rounds} rounds"))


@dataclasses.dataclass(frozen=True)
class _Contender:
    """What is timed.

    Attributes:
        executable: It.
        call: Calls it, with inputs made beforehand.
        memory_bytes: How much more the process held after it was loaded and called once.
    """

    executable: Executable
    call: Callable[[], object]
    memory_bytes: int | None


def _contenders(
    artifacts: list[Path], model: str | None, sizes: tuple[int, int]
) -> dict[str, _Contender]:
    """What is timed, by name; the original first."""
    # Artifacts first: they are checked in no time, and a model may take long to read.
    loaded = {
        str(folder): _contender(functools.partial(api.load, folder), sizes) for folder in artifacts
    }
    if model is None:
        return loaded
    original = _contender(lambda: api.lower(api.capture(model), "eager"), sizes)
    return {f"{Path(model).name} (original)": original} | loaded


def _contender(load: Callable[[], Executable], sizes: tuple[int, int]) -> _Contender:
    before = memory.resident_bytes()
    executable = load()
    values = inputs.example_inputs(executable.inputs, batch=sizes[0], sequence=sizes[1])
    executable.run(values)
    after = memory.resident_bytes()
    held = None if before is None or after is None else max(after - before, 0)
    return _Contender(executable, lambda: executable.run(values), held)


def _table(contenders: dict[str, _Contender], timings: dict[str, Timing], title: str) -> Table:
    figures = ("files", "weights", "memory", "median", "best", "spread", "relative")
    table = table_of(title, "artifact", "backend", *figures, numbers=figures)
    first = next(iter(timings.values())).median_seconds
    for name, contender in contenders.items():
        timing, executable, held = timings[name], contender.executable, contender.memory_bytes
        table.add_row(
            name,
            executable.backend,
            bytes_text(executable.file_bytes),
            bytes_text(executable.weight_bytes),
            "" if held is None else bytes_text(held),
            seconds_text(timing.median_seconds),
            seconds_text(timing.best_seconds),
            f"{timing.spread_ratio:.0%}",
            f"{timing.median_seconds / first:.2f}x",
        )
    return table


def _data(name: str, contender: _Contender, timing: Timing) -> dict[str, Any]:
    executable = contender.executable
    return {
        "artifact": name,
        "backend": executable.backend,
        "file_bytes": executable.file_bytes,
        "weight_bytes": executable.weight_bytes,
        "memory_bytes": contender.memory_bytes,
        **dataclasses.asdict(timing),
    }
