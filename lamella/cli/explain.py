"""``lamella explain``: which words or pixels an answer hangs on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli.console import Stages, errors_in_one_line, out, show_json
from lamella.cli.lazy import explaining, explanation_files, explanation_reading

if TYPE_CHECKING:
    from lamella.explanation import Explanation

_INDEX = re.compile(r"\(?\s*-?\d+(\s*,\s*-?\d+)+\s*\)?")
_ENDINGS = (".html", ".json", ".png")


@errors_in_one_line()
def explain_input(  # noqa: PLR0913  (options of a command)
    model: Annotated[str, typer.Argument(help="Model folder or hub id.", show_default=False)],
    given: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A text, an image, or a .safetensors or .npz file with the inputs by name.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            help="A class or its label, a token (what comes next), an index 0,-1,17 into the "
            "output, or a seed: logit, contrastive:3, softmax:3, difference:3,5."
        ),
    ] = "logit",
    preset: Annotated[
        str, typer.Option(help="Rules: cp, attnlrp, relp, gamma, gradient, ….")
    ] = "cp",
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Say what biases and others kept.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.")] = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Write a picture: the map of the pixels, or bars of blocks and heads."),
    ] = None,
    over: Annotated[
        bool, typer.Option("--over", help="Draw the map of the pixels over the image.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--out", help="Write what the ending says: .html, .json, .png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show how much each token or pixel, branch and head speaks for an output of the model."""
    wanted = ((html, (".html",)), (png, (".png",)), (output, _ENDINGS))
    files = [(path, endings) for path, endings in wanted if path is not None]
    for path, endings in files:
        explanation_files.check(path, endings)
    with Stages() as stage:
        stage("explaining")
        inputs = explanation_reading.read_inputs(model, given)
        found = explaining.explain(
            model, inputs, target=_target(target), preset=preset, ledger=ledger
        )
    for path, _ in files:
        found.save(path, over=over)
    _show(found, [path for path, _ in files], as_json=as_json)


def _show(found: Explanation, files: list[Path], *, as_json: bool) -> None:
    if as_json:
        show_json(found.data())
        return
    out.print(found.terminal())
    for path in files:
        out.print(f"written to {path}", markup=False)


def _target(text: str) -> int | str | tuple[int, ...]:
    if _INDEX.fullmatch(text):
        return tuple(map(int, text.strip("() ").split(",")))
    try:
        return int(text)
    except ValueError:
        return text
