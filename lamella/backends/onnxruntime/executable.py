"""A model in an ONNX file, run by ONNX Runtime."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lamella.backends.base import Executable
from lamella.backends.decoder import Decoder, GrowingDecoder, check_covered
from lamella.backends.inputs import InputSpec, check_inputs
from lamella.backends.onnxruntime.binding import Binding
from lamella.backends.onnxruntime.decoder import OnnxDecoder
from lamella.backends.onnxruntime.files import DECODER, MODEL, Scratch, files_in
from lamella.backends.onnxruntime.session import Session
from lamella.backends.onnxruntime.writer import Output
from lamella.errors import ArtifactError
from lamella.ir.cache import CacheLayout
from lamella.ir.signature import Signature
from lamella.report import Report


@dataclass(frozen=True)
class OnnxFiles:
    """The files of a model, and what they don't say themselves.

    Attributes:
        folder: Where `model.onnx` lies.
        outputs: Where each flat output of the signature comes from.
        weight_bytes: Bytes of the weights.
        binding: What buffers can do for the graph of `decoder.onnx`; None without that file.
        temporary: The owner of the folder when it goes with the executable.
    """

    folder: Path
    outputs: tuple[Output, ...]
    weight_bytes: int
    binding: Binding | None = None
    temporary: Scratch | None = None


@dataclass(frozen=True)
class Opener:
    """How sessions are made.

    Attributes:
        provider: Execution provider.
        threads: Threads for one operator; None means the physical cores.
    """

    provider: str
    threads: int | None

    def open(self, path: Path) -> Session:
        """A session of an ONNX file."""
        return Session(path, provider=self.provider, threads=self.threads)


class OnnxExecutable(Executable):
    """A model run by ONNX Runtime."""

    backend = "onnxruntime"

    def __init__(
        self,
        files: OnnxFiles,
        opener: Opener,
        signature: Signature,
        inputs: Sequence[InputSpec],
        report: Report | None = None,
    ) -> None:
        """Open a session of the model in `files`.

        A model with its caches as buffers is opened as that: two sessions would hold the weights
        twice, and the other is needed by few.
        """
        super().__init__(signature, report, inputs)
        self._files, self._opener = files, opener
        _ = self.session if files.binding is None else self._buffered

    @cached_property
    def session(self) -> Session:
        """The session, loaded and optimized."""
        return self._opener.open(self._files.folder / MODEL)

    @cached_property
    def _buffered(self) -> Session:
        return self._opener.open(self._files.folder / DECODER)

    def decoder(self, layout: CacheLayout) -> Decoder:
        """A decoder whose caches are buffers where they can be.

        Raises:
            BackendError: The graph takes something that generation has nothing to give for.
        """
        general = lambda: GrowingDecoder(  # noqa: E731
            self.run, layout, self.inputs, self.signature.outputs
        )
        binding = self._files.binding
        if binding is None:
            return general()
        check_covered(layout, [spec.name for spec in self.inputs])
        return OnnxDecoder(layout, self._buffered, binding, general)

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """The flat outputs of flat inputs; tensors are handed over without copies."""
        check_inputs(self.inputs, values)
        taken = set(self.session.inputs)
        feeds = {
            spec.name: cast(Tensor, value)
            for spec, value in zip(self.inputs, values, strict=True)
            if spec.name in taken
        }
        names = [output.name for output in self._files.outputs if output.name is not None]
        results = iter(self.session.run(feeds, names))
        return [
            output.value
            if output.name is None
            else int(next(results))
            if output.integer
            else next(results)
            for output in self._files.outputs
        ]

    def repeated(self, values: Sequence[Any]) -> Callable[[], object]:
        """A call whose inputs and outputs are bound; outputs of one shape share their memory."""
        results = self.run(values)
        call, memory = self.session.bind(), dict[tuple[Any, ...], Tensor]()
        for spec, value in zip(self.inputs, values, strict=True):
            if spec.name in self.session.inputs:
                call.input(spec.name, cast(Tensor, value).contiguous())
        for output, result in zip(self._files.outputs, results, strict=True):
            if output.name is not None:
                made = torch.as_tensor(result)
                shared = memory.setdefault((made.shape, made.dtype), made)
                call.output(output.name, shared)
        return call.run

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        return self._files.weight_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the ONNX file and its data."""
        return sum(path.stat().st_size for path in files_in(self._files.folder))

    def write_files(self, folder: Path) -> Mapping[str, Any]:
        """Copy the files; those of a temporary folder are linked where the disk allows it."""
        for path in files_in(self._files.folder):
            if self._files.temporary is None or not _linked(path, folder / path.name):
                shutil.copyfile(path, folder / path.name)
        return {
            "outputs": [[o.name, o.value, o.integer] for o in self._files.outputs],
            "weight_bytes": self.weight_bytes,
            "binding": None if self._files.binding is None else self._files.binding.to_json(),
            "provider": self._opener.provider,
        }


def files_from(folder: Path, details: Mapping[str, Any]) -> OnnxFiles:
    """The files in a folder that `OnnxExecutable.write_files` wrote.

    Raises:
        ArtifactError: The manifest is malformed.
    """
    try:
        outputs = tuple(
            Output(name, value, bool(integer)) for name, value, integer in details["outputs"]
        )
        bound = details.get("binding")
        binding = None if bound is None else Binding.from_json(bound)
        return OnnxFiles(folder, outputs, int(details["weight_bytes"]), binding)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"the manifest of {str(folder)!r} does not describe an ONNX model "
            f"({type(error).__name__}: {error}); save the executable again"
        ) from error


def _linked(source: Path, target: Path) -> bool:
    """Give a file that is never written again a second name; not every file system can."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
