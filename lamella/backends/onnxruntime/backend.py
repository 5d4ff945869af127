"""The backend that writes ONNX and runs it with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lamella.backends.artifact import Artifact
from lamella.backends.base import Backend
from lamella.backends.formats import QuantFormat
from lamella.backends.inputs import specs_from_json, specs_of
from lamella.backends.onnxruntime.binding import binding_of
from lamella.backends.onnxruntime.emission import Caches
from lamella.backends.onnxruntime.executable import (
    OnnxExecutable,
    OnnxFiles,
    Opener,
    files_from,
)
from lamella.backends.onnxruntime.files import (
    DECODER,
    MODEL,
    Scratch,
    save_beside,
    save_model,
    weight_bytes,
)
from lamella.backends.onnxruntime.formats import formats
from lamella.backends.onnxruntime.session import CPU, require
from lamella.backends.onnxruntime.writer import outputs_of, unsupported, write_onnx
from lamella.errors import ArtifactError, BackendError
from lamella.ir.graph import Graph
from lamella.ir.signature import Signature
from lamella.report import Report


@dataclass(frozen=True)
class OnnxRuntimeBackend(Backend):
    """Runs graphs with ONNX Runtime.

    Attributes:
        provider: Execution provider; one that is missing or does not load is an error.
        threads: Threads for one operator; None means the physical cores of this process.
        opset: Version of the standard operators, 21 to 23.
        contrib: Use the operators that ONNX Runtime adds to ONNX.
        scratch: Where models are written before they are saved; None means the folder for
            temporary files.
        slow_kernels: Use kernels that are slower than floats on this machine too.
    """

    name: ClassVar[str] = "onnxruntime"

    provider: str = CPU
    threads: int | None = None
    opset: int = 23
    contrib: bool = True
    scratch: Path | None = None
    slow_kernels: bool = False

    def ensure_available(self) -> None:
        """Refuse at once when the package or the provider is missing.

        Raises:
            ProviderError: It says which, and the command that mends it.
        """
        require(self.provider)

    def unsupported(self, graph: Graph) -> dict[str, int]:
        """Every operator without an ONNX emitter, with how often it occurs."""
        return unsupported(graph)

    def formats(self) -> Sequence[QuantFormat]:
        """The formats of weights that ONNX Runtime has kernels for."""
        return tuple(formats(self.contrib))

    def lower(self, graph: Graph, report: Report | None = None) -> OnnxExecutable:
        """Write a canonical graph to ONNX and load it.

        Raises:
            UnsupportedError: Some operators can't be lowered; all are listed.
            BackendError: The model computes in bfloat16, which the CPU has no kernels for.
            ProviderError: The package or the provider is missing or did not load.
            OSError: The disk is full.
        """
        self.ensure_available()
        self.check(graph)
        if self.provider == CPU:
            _refuse_bfloat16(graph)
        scratch = Scratch(self.scratch)
        model = write_onnx(graph, opset=self.opset, contrib=self.contrib)
        size = weight_bytes(model)
        binding = binding_of(graph) if self.contrib and self.provider == CPU else None
        if binding is None:
            save_model(model, scratch.path)
        else:
            buffered = write_onnx(
                graph, opset=self.opset, contrib=self.contrib, caches=Caches.BOUND
            )
            save_model(buffered, scratch.path, DECODER, shares_weights=True)
            save_beside(model, scratch.path, DECODER)
        files = OnnxFiles(scratch.path, outputs_of(graph), size, binding, scratch)
        return OnnxExecutable(files, self._opener(), graph.signature, specs_of(graph), report)

    def load(self, artifact: Artifact) -> OnnxExecutable:
        """The executable in a folder whose digests were checked.

        Raises:
            ArtifactError: The folder is corrupt, or was made for another provider.
            ProviderError: The package or the provider is missing or did not load.
        """
        described = artifact.description
        if MODEL not in artifact.files:
            raise ArtifactError(f"{str(artifact.folder)!r} has no {MODEL}")
        files = files_from(artifact.folder, described.details)
        signature = Signature.from_json(described.signature)
        report = None if described.report is None else Report.from_json(described.report)
        inputs = specs_from_json(described.inputs)
        return OnnxExecutable(files, self._opener_for(described.details), signature, inputs, report)

    def _opener(self) -> Opener:
        return Opener(self.provider, self.threads)

    def _opener_for(self, details: Mapping[str, Any]) -> Opener:
        """Sessions of a saved model: on the provider that it was made for, and no other."""
        made_for = details.get("provider", CPU)
        if self.provider not in (CPU, made_for):
            raise ArtifactError(
                f"the model was saved for {made_for}, not for {self.provider}; compile it again "
                f"with OnnxRuntimeBackend(provider={self.provider!r})"
            )
        return Opener(str(made_for), self.threads)


def _refuse_bfloat16(graph: Graph) -> None:
    """Say early, and in words, what ONNX Runtime would say of some node of the file."""
    values = [node.meta.get("val") for node in graph.nodes]
    count = sum(isinstance(v, Tensor) and v.dtype == torch.bfloat16 for v in values)
    if count:
        raise BackendError(
            f"the model computes in bfloat16 ({count} values), for which onnxruntime has no "
            f"kernels on the CPU; convert it with model.float() before capture"
        )
