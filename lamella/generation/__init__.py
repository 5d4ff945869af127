"""Language models that generate: lowering, running and loading them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from lamella.backends.artifact import Artifact, Description
from lamella.backends.base import NO_LANGUAGE_MODEL, Backend, Executable
from lamella.backends.inputs import specs_from_json, specs_of
from lamella.errors import ArtifactError, GenerationError, IncrementalError
from lamella.generation.families import class_for
from lamella.generation.model import (
    ONCE,
    STEP,
    TOKENIZER,
    GenerativeExecutable,
    Language,
    Parts,
)
from lamella.ir.cache import CacheLayout, Source
from lamella.ir.graph import Graph
from lamella.ir.huggingface import load_tokenizer
from lamella.ir.plan import PLAN_FILE, Plan
from lamella.ir.signature import Signature
from lamella.ir.stored_plan import stored_plan
from lamella.report import Report
from lamella.rewrite.incremental import incremental
from lamella.rewrite.incremental.check import check_steps

_log = logging.getLogger(__name__)

__all__ = [
    "GenerativeExecutable",
    "can_generate",
    "is_generative",
    "load",
    "load_any",
    "lower",
    "lower_any",
]


def can_generate(graph: Graph) -> bool:
    """Whether the model that `graph` came from generates text."""
    return graph.origin.generation is not None and graph.origin.config is not None


def lower(graph: Graph, backend: Backend, report: Report | None = None) -> GenerativeExecutable:
    """Lower a language model with its cache; `graph` is left as it is.

    Raises:
        IncrementalError: The graph can't continue from a cache.
        UnsupportedError: Some operators can't be lowered; all are listed.
    """
    origin = graph.origin
    if origin.generation is None or origin.config is None:
        raise GenerationError(
            f"{origin.architecture or 'the model'} has no generation config: only a language "
            f"model of transformers generates"
        )
    parts = incremental(graph)
    check_steps(graph, parts.step, parts.once)
    layout = parts.step.cache
    assert layout is not None
    others = [s for s in parts.outputs if s.graph == "step" and s.index]
    if others:
        raise IncrementalError(
            f"the model gives {len(others)} more outputs than logits; capture it without "
            f"(output_hidden_states, output_attentions) to generate"
        )
    executables = Parts(
        backend.lower(parts.step, report),
        None if parts.once is None else backend.lower(parts.once),
        layout,
        parts.outputs,
    )
    language = Language(origin.config, origin.generation, origin.architecture)
    made = class_for(origin.architecture)
    return made(executables, language, graph.signature, specs_of(graph), report)


def is_generative(artifact: Artifact) -> bool:
    """Whether a saved folder holds a language model with its cache."""
    return "generation" in artifact.description.details


def load(artifact: Artifact, backend: Backend) -> GenerativeExecutable:
    """The language model in a folder whose digests were checked.

    Raises:
        ArtifactError: The manifest is malformed.
    """
    described = artifact.description
    data: Any = described.details["generation"]
    try:
        layout = CacheLayout.from_json(data["layout"])
        outputs = tuple(Source(*source) for source in data["outputs"])
        found = {name: _part(artifact, name, part) for name, part in data["parts"].items()}
        language = Language(data["config"], data["generation_config"], data["architecture"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"the manifest of {str(artifact.folder)!r} does not describe a language model "
            f"({type(error).__name__}: {error}); save the executable again"
        ) from error
    parts = {name: backend.load(part) for name, part in found.items()}
    _check_layout(layout, parts[STEP])
    report = None if described.report is None else Report.from_json(described.report)
    made = class_for(language.architecture)(
        Parts(parts[STEP], parts.get(ONCE), layout, outputs),
        language,
        Signature.from_json(described.signature),
        specs_from_json(described.inputs),
        report,
    )
    if (artifact.folder / TOKENIZER).is_dir():
        made.tokenizer = load_tokenizer(artifact.folder / TOKENIZER)
    return made


def _check_layout(layout: CacheLayout, step: Executable) -> None:
    """Refuse a layout that is not that of the graph it comes with.

    Raises:
        ArtifactError: An input or output is missing, or a slot has another type or shape.
    """
    specs = {spec.name: spec for spec in step.inputs}
    for slot in layout.slots:
        spec = specs.get(slot.input)
        shape = () if spec is None else spec.shape[1:]
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if spec is None or spec.dtype != slot.dtype or sizes != list(slot.shape):
            raise ArtifactError(
                f"the manifest says that the cache has {slot.input} of {slot.dtype} "
                f"{list(slot.shape)}, its graph takes {'no such input' if spec is None else spec}; "
                f"save it again"
            )
    named = {layout.logits, *(slot.output for slot in layout.slots)}
    missing = sorted(named.difference(step.signature.outputs))
    if missing:
        raise ArtifactError(
            f"the manifest names the outputs {', '.join(missing)}, which its graph does not have; "
            f"save it again"
        )


def _part(artifact: Artifact, name: str, part: Any) -> Artifact:
    """The folder of one part, as an artifact of its own."""
    description = Description(
        backend=artifact.description.backend,
        signature=part["signature"],
        inputs=part["inputs"],
        details=part["details"],
    )
    prefix = f"{name}/"
    files = {
        path.removeprefix(prefix): entry
        for path, entry in artifact.files.items()
        if path.startswith(prefix)
    }
    return replace(artifact, folder=artifact.folder / name, description=description, files=files)


def lower_any(
    graph: Graph, backend: Backend, report: Report | None = None, *, strict: bool = False
) -> Executable:
    """With its cache what generates, as it is what doesn't.

    A language model whose graph can't continue from a cache is lowered without; the report, the
    log and `generate` itself say why.

    Raises:
        IncrementalError: With `strict`, instead.
    """
    executable = _lower(graph, backend, report, strict)
    executable.plan = stored_plan(graph)
    return executable


def _lower(graph: Graph, backend: Backend, report: Report | None, strict: bool) -> Executable:
    if not can_generate(graph):
        return backend.lower(graph, report)
    try:
        return lower(graph, backend, report)
    except IncrementalError as error:
        if strict:
            error.add_note("strict: without its cache the model could be called, not generate")
            raise
        reason = f"no cache, so no generate: {error}"
        _log.warning("%s: %s", graph.origin.architecture, reason)
        told = (report or Report()).extended(remarks=(reason,))
        executable = backend.lower(graph, told)
        executable.no_generate = reason
        return executable


def load_any(artifact: Artifact, backend: Backend) -> Executable:
    """What `lower_any` made, from a folder whose digests were checked.

    Raises:
        ArtifactError: The manifest is malformed.
    """
    executable = load(artifact, backend) if is_generative(artifact) else backend.load(artifact)
    if PLAN_FILE in artifact.files:
        executable.plan = Plan.read(artifact.folder)
    if not is_generative(artifact):
        reason = artifact.description.details.get("no_generate", NO_LANGUAGE_MODEL)
        executable.no_generate = str(reason)
    return executable
