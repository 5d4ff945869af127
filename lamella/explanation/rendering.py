"""Explanations for people: tokens in colors, bars for sublayers and heads."""

from __future__ import annotations

import html
import io
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lamella.explanation.result import Explanation

_BAR = 24


def terminal(explanation: Explanation) -> Group:
    """Heat text and a table of the sublayers, for a rich console."""
    parts: list[RenderableType] = [Text(_title(explanation), style="bold")]
    for row, words in enumerate(explanation.words):
        parts.append(_heat(words, _strengths(explanation, row)))
    parts.append(_table(explanation))
    parts += [Text(line, style="dim") for line in _ledger(explanation)]
    return Group(*parts)


def plain(explanation: Explanation) -> str:
    """The same without colors; tokens with their relevance."""
    lines = [_title(explanation)]
    for row, words in enumerate(explanation.words):
        amounts = explanation.tokens[row].tolist()
        lines.append(" ".join(f"{w}({a:+.3g})" for w, a in zip(words, amounts, strict=True)))
    buffer = io.StringIO()
    console = Console(file=buffer, width=100, color_system=None, force_terminal=False)
    console.print(_table(explanation))
    return "\n".join([*lines, buffer.getvalue().rstrip(), *_ledger(explanation)])


def page(explanation: Explanation) -> str:
    """A self-contained HTML page."""
    rows = "".join(
        f"<p>{_spans(words, _strengths(explanation, row))}</p>"
        for row, words in enumerate(explanation.words)
    )
    bars = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(kind)}</td>"
        f'<td class="bar"><i style="width:{100 * share:.1f}%"></i></td><td>{flow:+.3g}</td></tr>'
        for name, kind, share, flow in _sublayers(explanation)
    )
    heads = "".join(
        f"<tr><td>{html.escape(block or node)}</td><td>{_squares(shares)}</td></tr>"
        for node, block, shares in _heads(explanation)
    )
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in _ledger(explanation))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>Lamella explanation</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(_title(explanation))}</h1>{rows}"
        f"<table><thead><tr><th>branch</th><th>kind</th><th>share</th><th>relevance</th></tr>"
        f"</thead><tbody>{bars}</tbody></table>"
        f"<table><thead><tr><th>attention</th><th>heads</th></tr></thead><tbody>{heads}</tbody>"
        f"</table><ul>{notes}</ul></body></html>"
    )


def _title(explanation: Explanation) -> str:
    return f"{explanation.target}: {explanation.start:.4g}, by the rules {explanation.preset}"


def _strengths(explanation: Explanation, row: int) -> list[float]:
    """Relevance of the tokens of a row over the largest, in [-1, 1]."""
    amounts = explanation.tokens[row].double()
    return (amounts / amounts.abs().max().clamp_min(1e-300)).tolist()


def _heat(words: tuple[str, ...], strengths: list[float]) -> Text:
    text = Text()
    for word, strength in zip(words, strengths, strict=True):
        red, green, blue = _color(strength)
        text.append(f"{word} ", style=f"black on rgb({red},{green},{blue})")
    return text


def _spans(words: tuple[str, ...], strengths: list[float]) -> str:
    return " ".join(
        f'<span title="{strength:+.3f}" style="background:rgb{_color(strength)}">'
        f"{html.escape(word)}</span>"
        for word, strength in zip(words, strengths, strict=True)
    )


def _color(strength: float) -> tuple[int, int, int]:
    """White for nothing, red for what speaks for the target, blue for what speaks against."""
    faded = round(255 * (1 - min(abs(strength), 1.0)))
    return (255, faded, faded) if strength >= 0 else (faded, faded, 255)


def _table(explanation: Explanation) -> Table:
    table = Table(box=None)
    for header in ("branch", "kind", "share", "relevance"):
        table.add_column(header, justify="right" if header == "relevance" else "left")
    for name, kind, share, flow in _sublayers(explanation):
        table.add_row(Text(name), kind, "█" * round(_BAR * share) or "▏", f"{flow:+.3g}")
    return table


def _sublayers(explanation: Explanation) -> list[tuple[str, str, float, float]]:
    return [(s.name, s.kind, s.share, s.amounts.flow) for s in explanation.sublayers]


def _heads(explanation: Explanation) -> list[tuple[str, str, list[float]]]:
    largest = max((h.mass for each in explanation.heads for h in each.heads), default=1.0) or 1.0
    return [
        (each.node, each.block, [h.flow / largest for h in each.heads])
        for each in explanation.heads
    ]


def _squares(strengths: list[float]) -> str:
    return "".join(
        f'<b title="head {index}: {strength:+.3f}" style="background:rgb{_color(strength)}"></b>'
        for index, strength in enumerate(strengths)
    )


def _ledger(explanation: Explanation) -> list[str]:
    if explanation.ledger is None:
        return []
    kept = [f"{cause} {amount:+.3g}" for cause, amount in explanation.ledger.kept.items() if amount]
    closure = f"the sum closes to {explanation.ledger.closure:.1e}"
    return [f"kept by {', '.join(kept)}; {closure}" if kept else closure]


_STYLE = (
    "body{font:15px/1.7 system-ui,sans-serif;margin:2rem;max-width:60rem;color:#111;"
    "background:#fff}h1{font-size:1.1rem}span{padding:.1rem .2rem;border-radius:.2rem}"
    "table{border-collapse:collapse;margin:1rem 0}th,td{text-align:left;padding:.15rem .8rem}"
    ".bar{width:14rem}.bar i{display:block;height:.8rem;background:#c33}"
    "td b{display:inline-block;width:.9rem;height:.9rem;margin-right:.15rem;"
    "border:1px solid #ccc}"
)
