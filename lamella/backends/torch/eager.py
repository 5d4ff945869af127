"""The eager backend: the graph as it is, run operator by operator by PyTorch.

It is the reference for other backends and the fallback where nothing else runs. It is not
faster than the model it came from, except by what the passes took away.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from lamella.backends.artifact import Artifact
from lamella.backends.base import Backend, Executable
from lamella.backends.formats import QuantFormat
from lamella.backends.inputs import check_inputs
from lamella.backends.torch.bound import bound
from lamella.backends.torch.formats import formats
from lamella.backends.torch.held import UNPACKED, Integers, Kernels, Lowered
from lamella.backends.torch.kernels import no_integer_products
from lamella.backends.torch.lowered import lowered
from lamella.backends.torch.portable import Portable
from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.signature import Signature
from lamella.report import Report

logger = logging.getLogger(__name__)

lam = torch.ops.lamella

INTEGERS = (lam.linear_int8.default, lam.linear_int8_static.default)


class EagerExecutable(Executable):
    """A graph that PyTorch runs operator by operator, without gradients."""

    backend = "eager"

    def __init__(
        self,
        portable: Portable,
        signature: Signature,
        report: Report | None,
        kernels: Kernels | None = None,
    ) -> None:
        """Build what runs from the portable graph."""
        super().__init__(signature, report, portable.inputs)
        self._portable = portable
        self.lowered = lowered(portable.module(), kernels)
        self._call = bound(self.lowered.module)

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """The flat outputs of flat inputs."""
        check_inputs(self.inputs, values)
        with torch.inference_mode():
            return self._call(*values)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        return self._portable.weight_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the files that `save` writes."""
        return self._portable.file_bytes

    def write_files(self, folder: Path) -> Mapping[str, Any]:
        """Write the portable graph."""
        self._portable.write(folder)
        allowed = self.lowered.kernels
        told: dict[str, Any] = {"bfloat16": True} if allowed.bfloat16 else {}
        told |= {} if allowed.native else {"native": False}
        return told if allowed.integers == "onednn" else told | {"integers": allowed.integers}

    @property
    def unpacked(self) -> int:
        """Weights of few bits that are held in full width."""
        return self.lowered.unpacked


@dataclass(frozen=True)
class EagerBackend(Backend):
    """Runs graphs in PyTorch as they are.

    Products of 8-bit integers run in a kernel of integers where there is one that is right. Other
    weights of few bits are unpacked once.

    Attributes:
        bfloat16: Let linear layers and attention multiply in bfloat16, with weights of 4 bits in
            a kernel of their own. The results are approximations: bfloat16 has 8 bits of
            precision. Layers of 8-bit integers with static ranges hand over codes, and do what
            runs between them.
        native: Compile kernels for these layers on this machine, where there is a compiler and
            the processor has AVX-512 with VNNI and BF16; otherwise oneDNN runs them.
        integers: What multiplies integers: ``"onednn"``; ``"traced"``, operators of ATen that
            compilers trace; or ``"floats"``, in which products of 8 bits are as exact.
        slow_kernels: Use kernels that are slower than floats on this machine too.
    """

    bfloat16: bool = False
    integers: Integers = "onednn"
    slow_kernels: bool = False
    native: bool = True

    name: ClassVar[str] = "eager"

    def unsupported(self, graph: Graph) -> dict[str, int]:
        """Operators that are not canonical; they would run, but could not be saved."""
        return not_canonical(graph)

    def formats(self) -> Sequence[QuantFormat]:
        """The formats of weights that PyTorch has kernels for, and those that are unpacked."""
        return tuple(formats(self.bfloat16, self.integers))

    def lower(self, graph: Graph, report: Report | None = None) -> EagerExecutable:
        """An executable with weights of its own.

        Raises:
            UnsupportedError: Some operators are not canonical.
        """
        self.check(graph)
        portable, allowed = Portable.of(graph), self._kernels(graph)
        executable = EagerExecutable(portable, graph.signature, report, allowed)
        told = tuple(_remarks(executable.lowered))
        if report is not None and told:
            executable.report = report.extended(remarks=told)
        return executable

    def load(self, artifact: Artifact) -> EagerExecutable:
        """The executable in a folder.

        Raises:
            ArtifactError: The folder is corrupt.
        """
        described = artifact.description
        report = None if described.report is None else Report.from_json(described.report)
        signature = Signature.from_json(described.signature)
        portable = Portable.read(artifact.folder)
        bfloat16 = self.bfloat16 or bool(described.details.get("bfloat16"))
        kept = described.details.get("integers", self.integers)
        native = self.native and bool(described.details.get("native", True))
        allowed = Kernels(_usable(kept), bfloat16, native)
        executable = EagerExecutable(portable, signature, report, allowed)
        if executable.lowered.obstacle:
            logger.warning("%s: %s", artifact.folder, _in_onednn(executable.lowered))
        return executable

    def without(self, format: QuantFormat) -> EagerBackend | None:
        """Products of integers are exact in floats too; other formats have one route."""
        if self.bfloat16 or self.integers == "floats" or format.operator not in INTEGERS:
            return None
        return replace(self, integers="floats")

    def _kernels(self, graph: Graph) -> Kernels:
        """What may be used; kernels are tried only where there is something for them."""
        wanted = bool(graph.find(*INTEGERS))
        integers = _usable(self.integers) if wanted else self.integers
        return Kernels(integers, self.bfloat16, self.native)


def _usable(integers: Integers) -> Integers:
    """What multiplies integers, unless it is wrong here."""
    return "floats" if integers == "onednn" and no_integer_products() else integers


def bfloat16_backend() -> EagerBackend:
    """The eager backend that multiplies in bfloat16."""
    return EagerBackend(bfloat16=True)


def not_canonical(graph: Graph) -> dict[str, int]:
    """The operators of `graph` that are not canonical, with how often they occur."""
    calls = (node.target for node in graph.nodes if node.op == "call_function")
    return dict(Counter(ops.op_name(target) for target in calls if target not in ops.CANONICAL))


def _remarks(state: Lowered) -> Iterator[str]:
    """What runs by which kernels, and what they approximate."""
    if state.unpacked:
        yield (
            f"{state.unpacked} packed weights were unpacked once: the eager backend holds them in "
            f"full width in memory, its files hold the codes"
        )
    special = {name: count for name, count in state.counts.items() if name != UNPACKED}
    if special:
        listed = ", ".join(f"{count} by {name}" for name, count in special.items())
        rough = " (products in bfloat16 are approximations)" if state.kernels.bfloat16 else ""
        yield f"linear layers with kernels of their own: {listed}{rough}"
    if state.obstacle:
        yield _in_onednn(state)


def _in_onednn(state: Lowered) -> str:
    return f"chains of 8-bit integers run in oneDNN, which is slower: {state.obstacle}"
