"""``lamella verify``: whether a saved folder is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.console import errors_in_one_line, out
from lamella.cli.lazy import artifact


@errors_in_one_line()
def verify_folders(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders of executables or checkpoints.", show_default=False),
    ],
) -> None:
    """Check every byte of saved folders against their manifests."""
    for folder in folders:
        artifact.verify(folder)
        out.print(f"{folder}: every file is as it was written", markup=False, soft_wrap=True)
