"""What a backend is, and what it makes: an executable with the signature of the model."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor

from lamella.backends.artifact import Artifact, Description, save_artifact
from lamella.backends.decoder import Decoder, GrowingDecoder
from lamella.backends.formats import QuantFormat
from lamella.backends.inputs import InputSpec
from lamella.errors import GenerationError, UnsupportedError
from lamella.ir.cache import CacheLayout
from lamella.ir.plan import PLAN_FILE, Plan
from lamella.ir.signature import Signature

if TYPE_CHECKING:
    from lamella.ir.graph import Graph
    from lamella.report import Report


NO_LANGUAGE_MODEL = "only a language model of transformers generates"
"""Why most executables don't generate."""


class Executable(abc.ABC):
    """A model that was lowered: callable like the model, with tensors in and out.

    Attributes:
        backend: Name of the backend that made it.
        signature: Inputs and outputs of the model.
        inputs: Dtype and shape of each flat input; saved in the manifest.
        report: What the compilation did, or None when the graph was lowered on its own.
        recipe: The passes as data (anything JSON can hold), written into the manifest.
        no_generate: Why it can't generate, if it can't; saved and loaded with it.
    """

    backend: ClassVar[str]

    def __init__(
        self,
        signature: Signature,
        report: Report | None = None,
        inputs: Sequence[InputSpec] = (),
    ) -> None:
        """Subclasses call this first; `inputs` are `specs_of(graph)`."""
        self.signature = signature
        self.inputs = tuple(inputs)
        self.report = report
        self.recipe: Any = None
        self.plan: Plan | None = None
        self.no_generate = NO_LANGUAGE_MODEL

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as the model is called; the result has the model's output type.

        Raises:
            SamplesError: An input is missing, unknown, or of another dtype or shape.
        """
        values = self.signature.flatten(args, kwargs)
        return self.signature.unflatten(self.run(values))

    @abc.abstractmethod
    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """The flat outputs of flat inputs, in the order of the signature.

        Raises:
            SamplesError: An input is of another dtype or shape than the model takes.
        """

    def repeated(self, values: Sequence[Any]) -> Callable[[], object]:
        """A call on the same flat inputs again and again, as cheap as it gets: for timing.

        Raises:
            SamplesError: An input is of another dtype or shape than the model takes.
        """
        return lambda: self.run(values)

    def generate(self, *_: Any, **__: Any) -> Any:
        """Text from a prompt: what language models do, see `GenerativeExecutable`.

        Raises:
            GenerationError: This model doesn't; the message says why.
        """
        raise GenerationError(f"this executable can't generate: {self.no_generate}")

    def decoder(self, layout: CacheLayout) -> Decoder:
        """The executable of a graph with a cache as a decoder.

        Args:
            layout: The cache of the graph that was lowered.

        Raises:
            BackendError: The graph takes something that generation has nothing to give for.
        """
        return GrowingDecoder(self.run, layout, self.inputs, self.signature.outputs)

    @property
    @abc.abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored."""

    @property
    @abc.abstractmethod
    def file_bytes(self) -> int:
        """Bytes of the files that `save` writes, without the manifest."""

    @abc.abstractmethod
    def write_files(self, folder: Path) -> Mapping[str, Any]:
        """Write the files of this executable into an empty folder.

        Returns:
            What `load` of the backend needs beside the files, as data for the manifest.
        """

    @final
    def save(self, folder: str | Path) -> None:
        """Save into `folder`, to be read back by `lamella.load`.

        Everything is written beside the folder, synced to disk and renamed: a failure leaves
        what was there before. A folder that holds an older artifact is replaced.

        Args:
            folder: New, empty, or an artifact saved before.

        Raises:
            ArtifactError: `folder` holds something else.
            OSError: The disk is full, or the folder can't be written.
        """
        description = Description(
            backend=self.backend,
            signature=self.signature.to_json(),
            inputs=[spec.to_json() for spec in self.inputs],
            recipe=self.recipe,
            report=None if self.report is None else self.report.to_json(),
        )
        save_artifact(Path(folder), description, self._write, self.file_bytes)

    def _write(self, folder: Path) -> Mapping[str, Any]:
        """Write the files; what the manifest says of them, and why this can't generate."""
        details = self.write_files(folder)
        if self.plan is not None:
            self.plan.write(folder / PLAN_FILE)
        told = self.no_generate != NO_LANGUAGE_MODEL
        return {**details, "no_generate": self.no_generate} if told else details


class Backend(abc.ABC):
    """Turns graphs into executables.

    Attributes:
        name: How users ask for it.
        slow_kernels: Use kernels that are slower than floats on this machine too, for the sake
            of memory; wrong ones never.
    """

    name: ClassVar[str]
    slow_kernels: bool = False

    @abc.abstractmethod
    def unsupported(self, graph: Graph) -> dict[str, int]:
        """Every operator the backend can't lower, with how often it occurs; quick."""

    @abc.abstractmethod
    def lower(self, graph: Graph, report: Report | None = None) -> Executable:
        """The executable of a canonical graph, which is left as it is.

        Raises:
            UnsupportedError: Some operators can't be lowered; all are listed.
        """

    @final
    def decoder(self, step: Graph, report: Report | None = None) -> Decoder:
        """A decoder of a graph that continues from a cache, see `rewrite.incremental`.

        Raises:
            GenerationError: The graph has no cache.
            UnsupportedError: Some operators can't be lowered; all are listed.
        """
        if step.cache is None:
            raise GenerationError(
                "the graph has no cache; make one that has with lamella.rewrite.incremental"
            )
        return self.lower(step, report).decoder(step.cache)

    @abc.abstractmethod
    def load(self, artifact: Artifact) -> Executable:
        """The executable in a folder whose digests were checked.

        Raises:
            ArtifactError: The folder is corrupt or does not fit this machine.
        """

    def ensure_available(self) -> None:  # noqa: B027  (most backends need nothing)
        """Refuse at once, before any work, when something the backend needs is missing.

        Raises:
            BackendError: A package, a provider or a compiler is missing; says how to get it.
        """

    def formats(self) -> Sequence[QuantFormat]:
        """The formats of weights that it has kernels for; none where nobody says."""
        return ()

    def trial(self) -> Backend:
        """A backend with the same kernels that lowers at once, for probes."""
        return self

    def without(self, format: QuantFormat) -> Backend | None:
        """A backend that runs a format exactly without its kernel; None where it can't.

        Layers of the format become layers of floats then.
        """
        return None

    @final
    def check(self, graph: Graph) -> None:
        """Refuse a graph that can't be lowered.

        Raises:
            UnsupportedError: Some operators can't be lowered; all are listed.
        """
        gaps = self.unsupported(graph)
        if gaps:
            listed = ", ".join(f"{name} (x{count})" for name, count in gaps.items())
            raise UnsupportedError(
                f"the {self.name} backend can't lower {listed}; use another backend or keep "
                f"these operators out of the graph"
            )


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
