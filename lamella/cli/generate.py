"""``lamella generate``: text from a compiled language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli.console import Stages, errors_in_one_line, out
from lamella.cli.lazy import api, transformers
from lamella.errors import GenerationError


@errors_in_one_line()
def generate_text(
    artifact: Annotated[
        Path, typer.Argument(help="Folder written by compile.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="What the text begins with.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token, more draws at random.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
) -> None:
    """Continue a text; tokens appear as they are made."""
    with Stages() as stage:
        stage("loading")
        executable: Any = api.load(artifact)
    tokenizer = getattr(executable, "tokenizer", None)
    if tokenizer is None:
        raise GenerationError(
            f"{str(artifact)!r} holds no language model with a tokenizer; compile a folder of "
            f"Hugging Face that has both"
        )
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {}
    if drawn:
        transformers.set_seed(seed)
    # The streamer writes to standard output itself.
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    executable.generate(
        **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **({"do_sample": False} | drawn),
    )
    out.file.flush()
