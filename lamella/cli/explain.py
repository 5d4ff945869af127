"""``lamella explain``: which words an answer hangs on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamella.cli.console import Stages, errors_in_one_line, out, show_json
from lamella.cli.lazy import explaining

if TYPE_CHECKING:
    from lamella.explanation import Explanation

_INDEX = re.compile(r"\(?\s*-?\d+(\s*,\s*-?\d+)+\s*\)?")


@errors_in_one_line()
def explain_text(  # noqa: PLR0913  (options of a command)
    model: Annotated[
        str, typer.Argument(help="Model folder or hub id, with a tokenizer.", show_default=False)
    ],
    text: Annotated[str, typer.Argument(help="What the model reads.", show_default=False)],
    target: Annotated[
        str,
        typer.Option(
            help="A class or its label, a token (what comes next), an index 0,-1,17 into the "
            "output, or a seed: logit, contrastive:3, softmax:3, difference:3,5."
        ),
    ] = "logit",
    preset: Annotated[str, typer.Option(help="Rules: cp, attnlrp, relp, gradient, ….")] = "cp",
    ledger: Annotated[bool, typer.Option(help="Say what biases and others kept.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show how much each token, branch and head speaks for an output of the model."""
    with Stages() as stage:
        stage("explaining")
        found = explaining.explain(
            model, text, target=_target(target), preset=preset, ledger=ledger
        )
    if html is not None:
        html.write_text(found.html(), encoding="utf-8")
    if as_json:
        show_json(_data(found))
        return
    out.print(found.terminal())


def _target(text: str) -> int | str | tuple[int, ...]:
    if _INDEX.fullmatch(text):
        return tuple(map(int, text.strip("() ").split(",")))
    try:
        return int(text)
    except ValueError:
        return text


def _data(found: Explanation) -> dict[str, Any]:
    return {
        "preset": found.preset,
        "target": found.target,
        "start": found.start,
        "tokens": [
            {"token": word, "relevance": amount}
            for word, amount in zip(found.words[0], found.tokens[0].tolist(), strict=True)
        ],
        "sublayers": [
            {"name": part.name, "kind": part.kind, "share": part.share, "flow": part.amounts.flow}
            for part in found.sublayers
        ],
        "ledger": None if found.ledger is None else dict(found.ledger.kept),
        "closure": None if found.ledger is None else found.ledger.closure,
    }
