"""``lamella compile``: a model through a pipeline into a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli.console import Stages, errors_in_one_line, out, show_json
from lamella.cli.lazy import api, artifact, instruments, plans, recipe, sample_files, save
from lamella.errors import ArtifactError

_CheckpointOption = Annotated[
    Path | None, typer.Option(help="Folder for a checkpoint that other runtimes load.")
]
_FormatOption = Annotated[
    str,
    typer.Option(
        help="Of the checkpoint: huggingface, compressed-tensors, gguf, onnxruntime-genai or "
        "aotinductor."
    ),
]
_MaxLossOption = Annotated[
    float | None, typer.Option(help="Stop when a pass costs more than this.")
]
_StrictOption = Annotated[
    bool,
    typer.Option("--strict", help="A layer that is skipped or whose kernel fails is an error."),
]
_LatencyOption = Annotated[
    str | None,
    typer.Option(help="Time the model after every pass, with this batch x sequence: 1x128."),
]

_PlanOption = Annotated[
    Path | None, typer.Option(help="Bit plan, a file or a saved folder; weights are stored so.")
]
_StoreOption = Annotated[
    Path | None, typer.Option(help="Folder for measured times; default: in the user's cache.")
]


_QUANTIZE = "quantize-weights"


@errors_in_one_line()
def compile_model(  # noqa: PLR0913  (one parameter per option)
    model: Annotated[
        str, typer.Argument(help="Model folder, hub id, .onnx or .pt2 file.", show_default=False)
    ],
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the executable.")
    ] = None,
    checkpoint: _CheckpointOption = None,
    format: _FormatOption = "huggingface",
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", "-r", help="YAML file with the passes.")
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", "-p", help='A pass, as "drop-blocks count=2"; repeatable.'),
    ] = None,
    plan: _PlanOption = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Text file (a text per line), or folder of .txt, .safetensors or .npz."),
    ] = None,
    backend: Annotated[
        str, typer.Option("--backend", "-b", help="onnxruntime, eager, aot, or one of a plugin.")
    ] = "onnxruntime",
    max_loss: _MaxLossOption = None,
    strict: _StrictOption = False,
    latency: _LatencyOption = None,
    store: _StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compile a model: edit it by passes and save something smaller and faster."""
    _check_targets(folder, checkpoint, format)
    pipeline = pipeline_of(recipe_file, passes or [], plan)
    timed = None if latency is None else api.Snapshots.of(latency)
    texts = None if samples is None else sample_files.read_samples(samples)
    with Stages() as stage:
        writer = _CheckpointWriter(checkpoint, format, stage)
        job = api.Compilation(
            pipeline,
            backend,
            max_loss=max_loss,
            strict=strict,
            instruments=(instruments.Progress(),),
            latency=timed,
            stage=stage,
            edited=writer.write,
            store=store,
        )
        report = _run(job, model, folder, texts)
    _show(report, folder, writer.reports, as_json)


@dataclass
class _CheckpointWriter:
    """Writes the edited model into a folder, where one was asked for.

    Attributes:
        folder: The folder, or None.
        format: Of the checkpoint.
        stage: Is told what begins.
        reports: What was written.
    """

    folder: Path | None
    format: str
    stage: Callable[[str], object]
    reports: list[Any] = field(default_factory=list[Any])

    def write(self, source: Any) -> None:
        """Write the model of `source`."""
        if self.folder is not None:
            self.stage("writing the checkpoint")
            written = save.save_checkpoint(source.graph, self.folder, format=self.format)
            self.reports.append(written)
            self.stage("")


def _run(job: Any, model: str, folder: Path | None, texts: Any) -> Any:
    """Compile into `folder`, or only edit when there is none; gives the report."""
    if folder is None:
        job.stage("reading the model")
        source = api.read(model)
        job.stage("")
        return job.edit(source, texts)
    executable = job.run(model, samples=texts)
    job.stage("saving")
    executable.save(folder)
    return executable.report


def _check_targets(folder: Path | None, checkpoint: Path | None, format: str) -> None:
    """Refuse places and formats that can't be written, before anything is computed.

    Raises:
        ArtifactError: A folder holds something else, or neither is given.
        CheckpointError: There is no such format.
    """
    if folder is None and checkpoint is None:
        raise ArtifactError("say where to write: --out for an executable, or --checkpoint")
    save.check_format(format)
    for place in (folder, checkpoint):
        if place is not None:
            artifact.check_target(place)


def pipeline_of(
    recipe_file: Path | None, passes: list[str], plan: Path | None = None
) -> tuple[Any, ...]:
    """The passes of a recipe file, then those of the options.

    A plan is followed by the first pass that quantizes weights, or else by one at the end. It is
    read here, before a model is.

    Raises:
        PlanError: There is no plan, or it is malformed.
        RecipeError: There is neither, or something is misspelled.
    """
    pipeline: tuple[Any, ...] = ()
    if recipe_file is not None:
        pipeline += recipe.load_recipe(recipe_file)
    pipeline += recipe.parse_passes(passes)
    if plan is None:
        return pipeline
    plans.Plan.read(plan)
    names = [one.name for one in pipeline]
    place = names.index(_QUANTIZE) if _QUANTIZE in names else len(names)
    rest = pipeline[place:] or recipe.parse_passes([_QUANTIZE])
    return (*pipeline[:place], recipe.parse_pass({"follow-plan": {"file": str(plan)}}), *rest)


def _show(report: Any, folder: Path | None, written: list[Any], as_json: bool) -> None:
    if folder is not None:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
        report = report.extended(files=sizes)
    if as_json:
        show_json({**report.to_json(), "checkpoints": [one.to_json() for one in written]})
        return
    out.print(report.table())
    for one in written:
        out.print(str(one), markup=False)
    if folder is not None:
        out.print(f"saved to {folder}", markup=False)
