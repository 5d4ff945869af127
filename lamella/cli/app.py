"""The commands and the options that stand before them."""

from __future__ import annotations

from typing import Annotated

import typer

import lamella
from lamella.cli import (
    bench,
    bisect,
    compile,
    explain,
    formats,
    generate,
    inspect,
    pareto,
    passes,
    tune,
    verify,
)
from lamella.cli.console import out, settings, show_warnings

app = typer.Typer(
    name="lamella",
    help="Compile trained neural networks into something smaller and faster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compile")(compile.compile_model)
app.command("generate")(generate.generate_text)
app.command("explain")(explain.explain_input)
app.command("inspect")(inspect.inspect_model)
app.command("passes")(passes.list_passes)
app.command("bench")(bench.bench_artifacts)
app.command("pareto")(pareto.pareto_front)
app.command("tune")(tune.tune_model)
app.command("formats")(formats.list_formats)
app.command("verify")(verify.verify_folders)
app.command("bisect")(bisect.bisect_recipe)


def main() -> None:
    """Run the command line; ends the process."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"lamella {lamella.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and details.")] = False,
) -> None:
    """Options that stand before the command."""
    settings.debug = debug
    show_warnings()
