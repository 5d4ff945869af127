"""``lamella passes``: what there is to put into a recipe."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lamella.cli.console import err, errors_in_one_line, out, show_json
from lamella.cli.lazy import options, plugins

if TYPE_CHECKING:
    from lamella.plugins import PassEntry


@errors_in_one_line()
def list_passes(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List transforms and analyses with their options, also those of plugins."""
    catalog = plugins.catalog()
    if as_json:
        passes = [_data(entry) for entry in catalog.passes]
        show_json({"passes": passes, "failed": list(catalog.failures)})
        return
    for kind, title in (("transform", "transforms"), ("analysis", "analyses")):
        out.print(_table(title, [entry for entry in catalog.passes if entry.kind == kind]))
    for failure in catalog.failures:
        err.print(f"warning: {failure}", style="yellow", markup=False)


def _table(title: str, entries: list[PassEntry]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 1, 0))
    for column in ("name", "what it does", "options"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        lines = [
            f"{o.name}={o.default}" if o.default is not None else f"{o.name} ({o.type})"
            for o in options.described(entry.cls)
        ]
        foreign = "" if entry.distribution.split()[0] == "lamella" else f" ({entry.distribution})"
        summary = options.summary_of(entry.cls).replace("``", "")
        table.add_row(entry.cls.name, summary + foreign, "\n".join(lines))
    return table


def _data(entry: PassEntry) -> dict[str, Any]:
    return {
        "name": entry.cls.name,
        "kind": entry.kind,
        "summary": options.summary_of(entry.cls),
        "options": [dataclasses.asdict(option) for option in options.described(entry.cls)],
        "distribution": entry.distribution,
    }
