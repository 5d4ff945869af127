"""Reports for people: terminal tables, plain text, one HTML page; and units."""

from __future__ import annotations

import html
import io
import math
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lamella.report import Loss, PassRecord, Report


def bytes_text(count: float) -> str:
    """``"1.5 MB"``; powers of 1000."""
    return _scaled(count, "B", ("k", "M", "G", "T"))


def count_text(count: float) -> str:
    """``"1.5 M"``; powers of 1000."""
    return _scaled(count, "", ("k", "M", "G", "T", "P")).rstrip()


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


def _scaled(count: float, unit: str, prefixes: tuple[str, ...]) -> str:
    value = float(count)
    if abs(value) < 1000:
        return f"{value:.10g} {unit}".rstrip()
    for prefix in prefixes:
        value /= 1000
        if abs(value) < 999.5 or prefix == prefixes[-1]:
            return f"{value:.3g} {prefix}{unit}"
    raise AssertionError("the last prefix always returns")


def loss_text(loss: Loss) -> str:
    """``"kl 0.012, top-1 98.5 %"``: the output that lost most."""
    if loss.worst is None:
        return "nothing to compare"
    text = f"{loss.worst.measure} {loss.worst.value:.3g}"
    return text if loss.agreement is None else f"{text}, top-1 {100 * loss.agreement:.1f} %"


HEADERS = ("pass", "effect", "nodes", "weights", "loss", "pass time", "checks")


def _row(record: PassRecord) -> tuple[str, ...]:
    quality = "" if record.deviation is None else f"error {record.deviation:.1g}"
    return (
        record.spelling or record.name,
        record.effect if record.edits else f"{record.effect}, no edit",
        _change(str(record.nodes_before), str(record.nodes_after)),
        _change(bytes_text(record.weight_bytes_before), bytes_text(record.weight_bytes_after)),
        quality if record.loss is None else loss_text(record.loss),
        seconds_text(record.seconds),
        seconds_text(record.verify_seconds + record.check_seconds),
    )


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def _lines(report: Report) -> list[str]:
    """Everything that is not a table of passes."""
    lines: list[str] = []
    for record in report.passes:
        lines += [_shortened(f"{record.name}: {remark}") for remark in record.remarks]
    lines += map(_shortened, report.remarks)
    for entry in report.latency:
        predicted, measured = entry.predicted_seconds, entry.measured_seconds
        told = [] if measured is None else [f"measured {seconds_text(measured)}"]
        told += [] if predicted is None else [f"predicted {seconds_text(predicted)}"]
        lines.append(f"{entry.backend}, {entry.subject}, {entry.inputs}: {', '.join(told)}")
    if report.memory is not None:
        before, peak = report.memory.before, report.memory.peak
        begun = "" if before is None else f" (at the start {bytes_text(before)})"
        lines.append(f"memory: at most {bytes_text(peak)}{begun}")
    if report.files:
        lines.append(f"files: {bytes_text(report.file_bytes)}")
    return lines


def _shortened(remark: str) -> str:
    """The first line; the rest is in the data and on the page."""
    first, *rest = remark.splitlines() or [""]
    return f"{first} (and {len(rest)} more lines)" if rest else first


def _details(report: Report) -> str:
    """Remarks of several lines, to unfold."""
    named = [(r.name, remark) for r in report.passes for remark in r.remarks]
    return "".join(
        f"<details><summary>{html.escape(_shortened(f'{name}: {remark}'))}</summary>"
        f"<pre>{html.escape(remark)}</pre></details>"
        for name, remark in named
        if "\n" in remark
    )


def _title(report: Report) -> str:
    before = report.model.weight_bytes
    size = _change(bytes_text(before), bytes_text(report.weight_bytes))
    share = f" ({100 * report.weight_bytes / before:.0f} %)" if before else ""
    return f"{report.model.name or 'model'}: weights {size}{share}"


def terminal(report: Report) -> Group:
    """A table of the passes and lines about the rest, for a rich console."""
    parts: list[RenderableType] = [Text(_title(report))]
    if report.passes:
        table = Table()
        for header in HEADERS:
            table.add_column(header)
        for record in report.passes:
            table.add_row(*map(Text, _row(record)))
        parts.append(table)
    parts += [Text(line) for line in _lines(report)]
    return Group(*parts)


def text_of(renderable: RenderableType, width: int = 140) -> str:
    """A rich renderable as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, force_terminal=False).print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def page(report: Report) -> str:
    """A self-contained HTML page."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in HEADERS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _row(record)) + "</tr>"
        for record in report.passes
    )
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in _lines(report))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Lamella report</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(_title(report))}</h1>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<ul>{lines}</ul>{_details(report)}<footer>{html.escape(versions)}</footer></body></html>"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;max-width:75rem}"
    "table{border-collapse:collapse}th,td{text-align:left;padding:.3rem .8rem;"
    "border-bottom:1px solid #ccc}h1{font-size:1.2rem}footer{color:#666}"
)
