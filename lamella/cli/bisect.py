"""``lamella bisect``: which pass, then which edit, cost too much."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from lamella.cli.compile import pipeline_of
from lamella.cli.console import Stages, errors_in_one_line, out, show_json
from lamella.cli.lazy import api, bisect, sample_files


@errors_in_one_line()
def bisect_recipe(
    model: Annotated[
        str, typer.Argument(help="Model folder, hub id, .onnx or .pt2 file.", show_default=False)
    ],
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", "-r", help="YAML file with the passes.")
    ] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", "-p", help="A pass; repeatable.")
    ] = None,
    max_loss: Annotated[
        float, typer.Option(help="The loss that is too much.", show_default=False)
    ] = 0.1,
    samples: Annotated[
        Path | None, typer.Option(help="Text file, or folder of .txt, .safetensors or .npz.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Find the pass, then the single edit, that first costs more than a loss."""
    pipeline = pipeline_of(recipe_file, passes or [])
    texts = None if samples is None else sample_files.read_samples(samples)
    with Stages() as stage:
        stage("reading the model")
        source = api.read(model)
        data = api.samples_for(source, texts)
        stage("searching")
        check = bisect.within_loss(source.graph, max_loss, data)
        report = bisect.bisect(source.graph, pipeline, check, samples=data)
    if as_json:
        show_json(dataclasses.asdict(report))
    else:
        out.print(str(report), markup=False)
