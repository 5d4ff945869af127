"""``lamella tune``: measure the kernels that a model could use on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lamella.cli.console import Stages, err, errors_in_one_line, out, show_json, table_of
from lamella.cli.lazy import api, machine, survey, tuner

if TYPE_CHECKING:
    from lamella.tuning.survey import Line


@errors_in_one_line()
def tune_model(  # noqa: PLR0913  (one parameter per option)
    model: Annotated[
        str, typer.Argument(help="Model folder, hub id, .onnx or .pt2 file.", show_default=False)
    ],
    rows: Annotated[
        str, typer.Option(help="Rows that the layers read: tokens, or sequences that decode.")
    ] = "1,16,128",
    formats: Annotated[
        str | None,
        typer.Option(help="Among fp32, 4/32 (bits/block), 4/32z (with zeros), int8; default: all."),
    ] = None,
    backend: Annotated[
        str, typer.Option("--backend", "-b", help="onnxruntime, eager, aot, or one of a plugin.")
    ] = "onnxruntime",
    store: Annotated[
        Path | None, typer.Option(help="Folder for the times; default: in the user's cache.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure what is known once more.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Measure kernels for budgets in milliseconds; what is interrupted keeps what it has."""
    chosen = survey.FORMATS if formats is None else tuple(formats.replace(" ", "").split(","))
    survey.check_formats(chosen)
    counts = _numbers(rows)
    with Stages() as stage:
        stage("reading the model")
        graph = api.capture(model)
        times = tuner.Tuner(
            lambda: api.find_backend(backend),
            store,
            again=again,
            progress=lambda done, total: stage(f"measuring kernels, {done} of {total} done"),
        )
        stage("measuring kernels")
        lines = survey.survey(graph, times, chosen, counts)
    for problem in times.take_problems():
        err.print(f"warning: {problem}", style="yellow", markup=False)
    if as_json:
        show_json({"machine": machine.machine(), "kernels": [_data(line) for line in lines]})
        return
    out.print(_table(lines, counts, machine.machine()))
    for note in times.take_notes():
        out.print(f"note: {note}", style="dim", markup=False)


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers with commas between them.

    Raises:
        ValueError: Something else, or a number less than 1.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"rows are numbers with commas between them (1,16,128), got {text!r}")
    return tuple(sorted({int(word) for word in words}))


def _table(lines: tuple[Line, ...], rows: tuple[int, ...], title: str) -> Table:
    figures = (*(f"ms, {count} row{'s' if count > 1 else ''}" for count in rows), "GB/s")
    table = table_of(title, "in x out", "format", *figures, numbers=figures)
    for line in lines:
        table.add_row(
            f"{line.inputs} x {line.outputs}",
            line.format,
            *(f"{line.seconds[count] * 1e3:.3g}" for count in rows),
            f"{line.bandwidth / 1e9:.1f}",
        )
    return table


def _data(line: Line) -> dict[str, Any]:
    return {**dataclasses.asdict(line), "bytes_per_second": line.bandwidth}
