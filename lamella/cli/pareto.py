"""``lamella pareto``: the best plans from the smallest to the largest budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lamella.cli.console import Stages, errors_in_one_line, out, show_json, table_of
from lamella.cli.front import check_picture, draw_front
from lamella.cli.lazy import api, recipe, sample_files

if TYPE_CHECKING:
    from lamella.passes.analyses.pareto import ParetoReport


@errors_in_one_line()
def pareto_front(  # noqa: PLR0913  (one parameter per option)
    model: Annotated[
        str, typer.Argument(help="Model folder, hub id, .onnx or .pt2 file.", show_default=False)
    ],
    samples: Annotated[
        Path | None,
        typer.Option(help="Text file (a text per line), or folder of .txt, .safetensors or .npz."),
    ] = None,
    by: Annotated[str, typer.Option(help="The score: fisher, kl, relevance, ….")] = "fisher",
    choices: Annotated[
        str, typer.Option(help="Widths (in blocks of 32, 64, 128), or bits/block: 2,4/32,8.")
    ] = "2,4,8",
    axis: Annotated[str, typer.Option(help="bytes, or time of a call on this machine.")] = "bytes",
    points: Annotated[int, typer.Option(help="How many budgets.")] = 16,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the front into a .png, .svg or .pdf file.")
    ] = None,
    plans: Annotated[
        Path | None, typer.Option(help="Folder for the plans, for compile --plan.")
    ] = None,
    backend: Annotated[
        str, typer.Option("--backend", "-b", help="What a time is of: onnxruntime, eager, aot.")
    ] = "onnxruntime",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with the plans.")] = False,
) -> None:
    """Show what the best plan loses for every size, or for every time of a call."""
    if plot is not None:
        check_picture(plot)
    if plans is not None:
        _check_folder(plans)
    options = {"by": by, "choices": choices, "axis": axis, "points": points}
    question = recipe.parse_analysis({"pareto": options})
    texts = None if samples is None else sample_files.read_samples(samples)
    with Stages() as stage:
        stage("scoring and solving")
        report: ParetoReport = api.analyze(model, question, samples=texts, backend=backend)
    if plot is not None:
        draw_front(report, plot)
    if plans is not None:
        _write(report, plans)
    if as_json:
        show_json(report.to_json())
        return
    out.print(_table(report))
    for path in (plot, plans):
        if path is not None:
            out.print(f"written to {path}", markup=False)


def _check_folder(folder: Path) -> None:
    """Refuse a place for the plans that is no folder.

    Raises:
        ValueError: It is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give a folder for the plans")


def _write(report: ParetoReport, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for point in report.points:
        point.plan.write(folder / f"{point.bits:.3f}-bits.json")


def _table(report: ParetoReport) -> Table:
    measured = any(point.measured is not None for point in report.points)
    timed = any(point.milliseconds is not None for point in report.points)
    columns = ("bits a weight", "MB", *["ms"] * timed, "predicted", *["measured"] * measured)
    table = table_of(f"loss by {report.by}, {report.unit}", *columns, numbers=columns)
    for point in report.points:
        row = [f"{point.bits:.3f}", f"{point.bytes / 1e6:.3f}"]
        row += [f"{point.milliseconds:.3g}"] if point.milliseconds is not None else []
        row += [f"{point.predicted:.3g}"]
        row += [f"{point.measured:.3g}"] if point.measured is not None else []
        table.add_row(*row)
    return table
