"""What users call. The only place that knows all layers.

Everything that can be wrong from the start (the recipe, the backend, the samples, operators the
backend can't lower) is checked before anything that takes long.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lamella import generation, plugins
from lamella.backends.artifact import Artifact, load_artifact, open_artifact
from lamella.backends.base import Backend, Executable
from lamella.backends.manifest import has_manifest
from lamella.backends.registry import HOMES, make_backend
from lamella.checkpoints.save import KINDS
from lamella.data import Batch, Samples
from lamella.errors import ArtifactError
from lamella.ir.finite import check_weights
from lamella.ir.graph import Graph
from lamella.ir.model_folder import CONFIG
from lamella.ir.sources import Inputs, Model, Source, read_model
from lamella.latency import Snapshots
from lamella.memory import peak_bytes, resident_bytes
from lamella.passes.base import Analyses, Analysis, Transform
from lamella.passes.instruments import Instrument
from lamella.passes.manager import run_passes
from lamella.passes.probes import check_samples
from lamella.recipe import parse_analysis, parse_passes, recipe_of
from lamella.report import Memory, Report
from lamella.rewrite.canonicalize import canonicalize
from lamella.tuning.measured import latencies
from lamella.tuning.offered import offered
from lamella.tuning.tuner import Tuner, Tuning

logger = logging.getLogger(__name__)

R = TypeVar("R")

Pass = Transform | str | Mapping[str, Any]
"""A pass: an object, ``"drop-blocks count=2"``, or a mapping from a recipe."""

SampleSource = Samples | Iterable[Batch] | Iterable[str]
"""Input dicts, or texts for a model whose folder has a tokenizer."""


def capture(model: Model, inputs: Inputs | None = None, *, dynamic: bool = True) -> Graph:
    """The canonical graph of a model; it shares the weights of the model and runs like it.

    Args:
        model: An `nn.Module`, a Hugging Face model, folder or hub id, an `ExportedProgram` or
            ``.pt2`` file, or an ``.onnx`` file. A graph is given back as it is.
        inputs: Sample inputs, a dict of keywords or a sequence of arguments; batch and
            sequence larger than 1. Models of Hugging Face and files don't need them.
        dynamic: Let batch and sequence vary.

    Raises:
        CaptureError: The model can't be traced, or inputs are missing.
        ModelFileError: A file is missing or corrupt.
    """
    return read(model, inputs, dynamic=dynamic).graph


def transform(
    graph: Graph,
    passes: Sequence[Pass],
    *,
    samples: SampleSource | None = None,
    max_loss: float | None = None,
    strict: bool = False,
    store: str | os.PathLike[str] | None = None,
) -> Report:
    """Edit a graph by passes, each of them checked; on any error the graph stays as it was.

    Args:
        graph: From `capture`; edited in place. The model it came from is not touched.
        passes: What to do, in order.
        samples: Calibration inputs; they also measure the loss.
        max_loss: Stop when the outputs are farther from the original than this (KL divergence
            in nats for logits, one minus cosine for embeddings).
        strict: Make it an error when a pass skips something.
        store: Folder for measured times of kernels, which passes with a budget in milliseconds
            ask for; None means one in the cache of the user.

    Raises:
        RecipeError: A pass or an option does not exist.
        SamplesError: The samples don't fit the graph.
        PassError: A pass failed, broke its promise, or cost more than `max_loss`.
    """
    place = None if store is None else Path(store)
    job = Compilation(parse_passes(passes), max_loss=max_loss, strict=strict, store=place)
    return job.edit(Source(graph), samples)


def lower(
    graph: Graph, backend: str | Backend = "onnxruntime", *, strict: bool = False
) -> Executable:
    """Turn a graph into an executable with the signature of the model.

    Args:
        graph: From `capture`.
        backend: ``"onnxruntime"``, ``"eager"``, ``"aot"``, one of a plugin, or an object.
        strict: Make it an error when a language model can't be lowered with its cache, and so
            could not generate, or when a kernel that it needs is wrong or slow on this machine.

    Raises:
        BackendError: There is no such backend, something it needs is missing, or it can't run
            some operators (all are listed).
        IncrementalError: With `strict`, see there.
    """
    lowering = find_backend(backend)
    lowering.ensure_available()
    lowering.check(graph)
    found = offered(graph, lowering, strict=strict)
    for text in found.remarks:
        logger.warning("%s", text)
    return generation.lower_any(found.graph, found.backend, strict=strict)


def compile(  # noqa: PLR0913  (the public signature)
    model: Model,
    inputs: Inputs | None = None,
    *,
    passes: Sequence[Pass],
    samples: SampleSource | None = None,
    backend: str | Backend = "onnxruntime",
    max_loss: float | None = None,
    strict: bool = False,
    store: str | os.PathLike[str] | None = None,
) -> Executable:
    """Capture a model, edit it by passes and lower it: `capture`, `transform`, `lower` in one.

    The model is not changed. The result is called like it and returns the same type.

    Args:
        model: As for `capture`.
        inputs: As for `capture`.
        passes: As for `transform`.
        samples: As for `transform`; texts when `model` is a folder with a tokenizer.
        backend: As for `lower`.
        max_loss: As for `transform`.
        strict: As for `transform` and `lower`.
        store: As for `transform`.

    Raises:
        LamellaError: See `capture`, `transform` and `lower`.
    """
    place = None if store is None else Path(store)
    parsed = parse_passes(passes)
    job = Compilation(parsed, backend, max_loss=max_loss, strict=strict, store=place)
    return job.run(model, inputs, samples)


def analyze(
    model_or_graph: Model,
    analysis: Analysis[R] | str | Mapping[str, Any],
    *,
    samples: SampleSource | None = None,
    backend: str | Backend = "onnxruntime",
    store: str | os.PathLike[str] | None = None,
) -> R | Any:
    """The report of one analysis, for example ``analyze(model, Cost())`` or ``"cost"``.

    Args:
        model_or_graph: As for `capture`; a module that is not from Hugging Face is captured
            first, because it needs inputs.
        analysis: An object, or its spelling.
        samples: Calibration inputs, for an analysis that needs data.
        backend: What the model will run on, for an analysis that asks for measured times.
        store: As for `transform`.

    Raises:
        RecipeError: There is no such analysis.
        SamplesError: The samples are missing, or don't fit.
    """
    question = parse_analysis(analysis)
    source = read(model_or_graph)
    data = samples_for(source, samples)
    analyses = Analyses(source.graph, data)
    place = None if store is None else Path(store)
    analyses.times = Tuner(lambda: find_backend(backend), place)
    return analyses.get(question)


def load(folder: str | os.PathLike[str]) -> Executable:
    """The executable that was saved into `folder`, after its digests were checked.

    Raises:
        ArtifactError: The folder is missing or corrupt.
        BackendError: Something its backend needs is missing.
    """
    loaders = {name: _loader(name) for name in (*HOMES, *plugins.backends())}
    return load_artifact(os.fspath(folder), {**loaders, **dict.fromkeys(KINDS, _no_executable)})


@dataclass(frozen=True)
class Compilation:
    """A compilation before it meets a model.

    Attributes:
        passes: What to do, in order.
        backend: Name of a backend, or the backend.
        max_loss: Largest loss, or None.
        strict: Whether skipping something is an error.
        instruments: What watches the passes, for example a progress bar.
        latency: Measures the time of a call after every pass; None measures nothing.
        stage: Is told what begins: ``"reading the model"``, ``""`` before the passes, ….
        edited: Is given the model after the passes, before it is lowered.
        store: Folder for measured times of kernels; None means one in the cache of the user.
    """

    passes: tuple[Transform, ...]
    backend: str | Backend = "onnxruntime"
    max_loss: float | None = None
    strict: bool = False
    instruments: tuple[Instrument, ...] = ()
    latency: Snapshots | None = None
    stage: Callable[[str], object] = str
    edited: Callable[[Source], object] = id
    store: Path | None = None

    @cached_property
    def tuner(self) -> Tuner:
        """Measures kernels when a pass asks for their times, and only then."""
        return Tuner(lambda: find_backend(self.backend), self.store)

    def run(
        self,
        model: Model | Source,
        inputs: Inputs | None = None,
        samples: SampleSource | None = None,
    ) -> Executable:
        """Capture, edit and lower; a graph or source that is given stays as it is."""
        lowering, before = find_backend(self.backend), resident_bytes()
        lowering.ensure_available()
        self.stage("reading the model")
        source = model if isinstance(model, Source) else read(model, inputs)
        if isinstance(model, Source | Graph):
            source = Source(source.graph.copy(), source.tokenizer)
        lowering.check(source.graph)
        self.stage("")
        report = self.edit(source, samples)
        if self.latency is not None:
            self.stage("measuring latency")
            report = report.extended(latency=self.latency.measured(lowering))
        self.stage("trying kernels")
        found = offered(source.graph, lowering, self.store, strict=self.strict)
        report = report.extended(remarks=found.remarks)
        self.stage(f"lowering to {lowering.name}")
        executable = generation.lower_any(found.graph, found.backend, report, strict=self.strict)
        self._add_latencies(executable, found.graph)
        if executable.report is not None:
            memory = Memory(before, peak_bytes())
            executable.report = dataclasses.replace(executable.report, memory=memory)
        executable.recipe = recipe_of(self.passes)
        if isinstance(executable, generation.GenerativeExecutable):
            executable.tokenizer = source.tokenizer
        self.stage("")
        return executable

    def edit(self, source: Source, samples: SampleSource | None = None) -> Report:
        """Run the passes on the graph of `source`."""
        check_weights(source.graph)
        own = (Tuning(self.tuner), *([self.latency] if self.latency else ()))
        report = run_passes(
            source.graph,
            self.passes,
            samples=samples_for(source, samples),
            max_loss=self.max_loss,
            strict=self.strict,
            instruments=(*self.instruments, *own),
        )
        self.edited(source)
        return report

    def _add_latencies(self, executable: Executable, graph: Graph) -> None:
        """What was predicted for calls that passes asked about, and what they take."""
        if executable.report is not None and self.tuner.workloads:
            self.stage("measuring latency")
            found = tuple(latencies(executable, graph, self.tuner))
            told = (*self.tuner.take_notes(), *self.tuner.take_problems())
            executable.report = executable.report.extended(latency=found, remarks=told)


def find_backend(backend: str | Backend) -> Backend:
    """The backend of that name, of Lamella or of a plugin.

    Raises:
        BackendError: There is none of that name.
    """
    if isinstance(backend, Backend):
        return backend
    return make_backend(backend, plugins.backends())


def _no_executable(artifact: Artifact) -> Executable:
    """Refuse a checkpoint, which is sound and is for others to load."""
    format = KINDS[artifact.description.backend]
    raise ArtifactError(
        f"{str(artifact.folder)!r} is a checkpoint of format {format}, no executable; load "
        f"it with the runtime it was written for, or compile it"
    )


def _loader(name: str) -> Callable[[Artifact], Executable]:
    # The backend is imported when an artifact asks for it, not for every one there is.
    return lambda artifact: generation.load_any(artifact, find_backend(name))


def read(model: Model, inputs: Inputs | None = None, *, dynamic: bool = True) -> Source:
    """The canonical graph of a model, with its tokenizer; see `capture`."""
    if isinstance(model, str | os.PathLike):
        _check_checkpoint(Path(model))
    source = read_model(model, inputs, dynamic=dynamic)
    if not isinstance(model, Graph):
        canonicalize(source.graph)
    return source


def _check_checkpoint(folder: Path) -> None:
    """Check the digests of a folder that `save_checkpoint` wrote."""
    if (folder / CONFIG).is_file() and has_manifest(folder):
        open_artifact(folder)


def samples_for(source: Source, samples: SampleSource | None) -> Samples | None:
    """Samples that fit the graph, or None."""
    if samples is None:
        return None
    prepared = Samples.of(samples, tokenizer=source.tokenizer)
    if source.tokenizer is not None:
        # A tokenizer gives more than some models take.
        prepared = prepared.select(source.graph.signature.inputs)
    check_samples(prepared, source.graph)
    return prepared
