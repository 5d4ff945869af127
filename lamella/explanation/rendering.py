"""Explanations for people: tokens in colors, bars for blocks, branches and heads."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lamella.explanation.summary import HeadBars, Summary, strengths

_BAR = 24
_LEVELS = "▁▂▃▄▅▆▇█"
_FOR, _AGAINST = "red", "blue"


# ---- the terminal -----------------------------------------------------------------------


def terminal(summary: Summary) -> Group:
    """Heat text and tables of blocks, branches and heads, for a rich console."""
    parts: list[RenderableType] = [Text(summary.title, style="bold")]
    parts += [_heat(strengths(row)) for row in summary.rows]
    parts += _tables(summary)
    parts += [Text(line, style="dim") for line in summary.notes]
    return Group(*parts)


def plain(summary: Summary) -> str:
    """The same without colors; tokens with their relevance."""
    lines = [summary.title]
    lines += [" ".join(f"{word}({amount:+.3g})" for word, amount in row) for row in summary.rows]
    buffer = io.StringIO()
    console = Console(file=buffer, width=100, color_system=None, force_terminal=False)
    for table in _tables(summary):
        console.print(table)
    return "\n".join([*lines, buffer.getvalue().rstrip(), *summary.notes])


def _heat(words: Iterable[tuple[str, float]]) -> Text:
    text = Text()
    for word, strength in words:
        red, green, blue = _color(strength)
        text.append(f"{word} ", style=f"black on rgb({red},{green},{blue})")
    return text


def _tables(summary: Summary) -> list[Table]:
    found = [_blocks(summary), _branches(summary), _heads(summary)]
    return [table for table in found if table.row_count]


def _table(*headers: str) -> Table:
    table = Table(box=None)
    for header in headers:
        table.add_column(header, justify="right" if header == "relevance" else "left")
    return table


def _blocks(summary: Summary) -> Table:
    table = _table("block", "adds", "relevance")
    for bar in summary.blocks:
        length = round(_BAR * abs(bar.flow) / summary.largest_block)
        drawn = Text("█" * length or "▏", style=_side(bar.flow))
        table.add_row(Text(bar.name), drawn, f"{bar.flow:+.3g}")
    return table


def _branches(summary: Summary) -> Table:
    table = _table("branch", "kind", "share", "relevance")
    for bar in summary.branches:
        drawn = "█" * round(_BAR * (bar.share or 0.0)) or "▏"
        table.add_row(Text(bar.name), bar.kind, drawn, f"{bar.flow:+.3g}")
    return table


def _heads(summary: Summary) -> Table:
    table = _table("attention", "heads", "strongest")
    for bars in summary.heads:
        drawn = Text()
        for flow in bars.flows:
            level = round((len(_LEVELS) - 1) * abs(flow) / summary.largest_head)
            drawn.append(_LEVELS[level], style=_side(flow))
        table.add_row(Text(bars.name), drawn, _strongest(bars))
    return table


def _strongest(bars: HeadBars) -> str:
    place = max(range(len(bars.flows)), key=lambda head: abs(bars.flows[head]))
    return f"head {place}: {bars.flows[place]:+.3g}"


def _side(flow: float) -> str:
    return _FOR if flow >= 0 else _AGAINST


def _color(strength: float) -> tuple[int, int, int]:
    """White for nothing, red for what speaks for the target, blue for what speaks against."""
    faded = round(255 * (1 - min(abs(strength), 1.0)))
    return (255, faded, faded) if strength >= 0 else (faded, faded, 255)


# ---- the page ---------------------------------------------------------------------------


def page(summary: Summary, picture: bytes | None = None) -> str:
    """A self-contained HTML page.

    Args:
        summary: What it shows.
        picture: A PNG that is put into the page.
    """
    rows = "".join(f"<p>{_spans(strengths(row))}</p>" for row in summary.rows)
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in summary.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>Lamella explanation</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(summary.title)}</h1>{rows}{_image(picture)}"
        f"{_page_blocks(summary)}{_page_branches(summary)}{_page_heads(summary)}"
        f"<ul>{notes}</ul></body></html>"
    )


def _image(picture: bytes | None) -> str:
    if picture is None:
        return ""
    encoded = base64.b64encode(picture).decode("ascii")
    return f'<p><img alt="relevance of pixels" src="data:image/png;base64,{encoded}"></p>'


def _spans(words: Iterable[tuple[str, float]]) -> str:
    return " ".join(
        f'<span title="{strength:+.3f}" style="background:rgb{_color(strength)}">'
        f"{html.escape(word)}</span>"
        for word, strength in words
    )


def _page_blocks(summary: Summary) -> str:
    return _page_table(
        ("block", "adds", "relevance"),
        (
            (
                html.escape(bar.name),
                _page_bar(abs(bar.flow) / summary.largest_block, bar.flow),
                f"{bar.flow:+.3g}",
            )
            for bar in summary.blocks
        ),
    )


def _page_branches(summary: Summary) -> str:
    return _page_table(
        ("branch", "kind", "share", "relevance"),
        (
            (
                html.escape(bar.name),
                html.escape(bar.kind),
                _page_bar(bar.share or 0.0, 0.0),
                f"{bar.flow:+.3g}",
            )
            for bar in summary.branches
        ),
    )


def _page_heads(summary: Summary) -> str:
    return _page_table(
        ("attention", "heads", "strongest"),
        (
            (html.escape(bars.name), _columns(bars, summary.largest_head), _strongest(bars))
            for bars in summary.heads
        ),
    )


def _page_table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    if not body:
        return ""
    head = "".join(f"<th>{header}</th>" for header in headers)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _page_bar(share: float, flow: float) -> str:
    kind = "against" if flow < 0 else "for"
    return f'<div class="bar"><i class="{kind}" style="width:{100 * share:.1f}%"></i></div>'


def _columns(bars: HeadBars, largest: float) -> str:
    """A column for each head, as high as its relevance is large."""
    return "".join(
        f'<b title="head {index}: {flow:+.3g}"><i class="{"against" if flow < 0 else "for"}" '
        f'style="height:{100 * abs(flow) / largest:.1f}%"></i></b>'
        for index, flow in enumerate(bars.flows)
    )


_STYLE = (
    "body{font:15px/1.7 system-ui,sans-serif;margin:2rem;max-width:60rem;color:#111;"
    "background:#fff}h1{font-size:1.1rem}span{padding:.1rem .2rem;border-radius:.2rem}"
    "img{max-width:100%}"
    "table{border-collapse:collapse;margin:1rem 0}th,td{text-align:left;padding:.15rem .8rem}"
    ".bar{width:14rem}.bar i{display:block;height:.8rem}.for{background:#c33}"
    ".against{background:#36c}"
    "td b{display:inline-flex;align-items:flex-end;width:.8rem;height:1.6rem;"
    "margin-right:.15rem;background:#f3f3f3}td b i{display:block;width:100%}"
)
