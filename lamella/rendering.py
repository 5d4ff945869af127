"""A table with lines for people: on a terminal, as plain text, as one HTML page; and units."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

_PREFIXES = ("k", "M", "G", "T")


def bytes_text(count: float) -> str:
    """``"1.5 MB"``; powers of 1000."""
    value = float(count)
    if abs(value) < 1000:
        return f"{value:.10g} B"
    for prefix in _PREFIXES:
        value /= 1000
        if abs(value) < 999.5 or prefix == _PREFIXES[-1]:
            return f"{value:.3g} {prefix}B"
    raise AssertionError("the last prefix always returns")


def seconds_text(seconds: float) -> str:
    """``"12 µs"``, ``"3.1 ms"``, ``"2.5 s"``, ``"2 min 5 s"``."""
    if seconds == math.inf:
        return "∞ s"
    if seconds >= 60:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60} s"
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


@dataclass(frozen=True)
class Sheet:
    """A table with lines around it.

    Attributes:
        title: Above the table.
        headers: Of the columns.
        rows: Cells; without any there is no table.
        lines: Below the table.
        details: On the page only: what is told in short, and all of it to unfold.
        footer: On the page only.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str]
    details: Sequence[tuple[str, str]]
    footer: str


def terminal(sheet: Sheet) -> Group:
    """For a rich console; where it is narrow, cells go on in the next line."""
    parts: list[RenderableType] = [Text(sheet.title)]
    if sheet.rows:
        table = Table(box=None)
        for header in sheet.headers:
            table.add_column(header, overflow="fold")
        for row in sheet.rows:
            table.add_row(*map(Text, row))
        parts.append(table)
    return Group(*parts, *map(Text, sheet.lines))


def text_of(renderable: RenderableType, width: int = 140) -> str:
    """A rich renderable as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, force_terminal=False).print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def page(sheet: Sheet) -> str:
    """A self-contained HTML page."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in sheet.headers)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in sheet.rows
    )
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in sheet.lines)
    details = "".join(
        f"<details><summary>{html.escape(short)}</summary><pre>{html.escape(text)}</pre></details>"
        for short, text in sheet.details
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Lamella report</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(sheet.title)}</h1>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<ul>{lines}</ul>{details}<footer>{html.escape(sheet.footer)}</footer></body></html>"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;max-width:75rem}"
    "table{border-collapse:collapse}th,td{text-align:left;padding:.3rem .8rem;"
    "border-bottom:1px solid #ccc}h1{font-size:1.2rem}footer{color:#666}"
)
