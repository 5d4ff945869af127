"""The aot backend: the graph compiled to machine code by AOTInductor.

The compiled package is a build product: it runs on the kind of processor and the version of
PyTorch it was made with. The portable graph lies beside it and holds the weights, so that an
artifact that was moved is compiled again when it is loaded. The package is machine code: load
artifacts only from people you trust.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx
from torch.export import Dim

from lamella.backends.artifact import Artifact
from lamella.backends.base import Backend, Executable
from lamella.backends.formats import QuantFormat
from lamella.backends.inputs import check_inputs, example_inputs
from lamella.backends.torch.eager import INTEGERS, EagerBackend, not_canonical
from lamella.backends.torch.formats import of_integers
from lamella.backends.torch.held import Integers, Kernels
from lamella.backends.torch.inductor import compile_package, load_package
from lamella.backends.torch.lowered import lowered
from lamella.backends.torch.portable import Portable
from lamella.errors import BackendError
from lamella.ir.adjoint_attention import ATTENTION_REFERENCE
from lamella.ir.adjoint_operators import ADJOINT_REFERENCE
from lamella.ir.cached_operators import CACHED_REFERENCE
from lamella.ir.graph import Graph
from lamella.ir.integer_operators import INTEGER_REFERENCE
from lamella.ir.operators import REFERENCE
from lamella.ir.rounding_operators import ROUNDING_REFERENCE
from lamella.ir.signature import Signature
from lamella.report import Report

PACKAGE = "compiled.pt2"

logger = logging.getLogger(__name__)

_KEPT = frozenset(
    {
        torch.ops.lamella.selective_scan.default,
        torch.ops.lamella.head_scan.default,
        torch.ops.lamella.cached_selective_scan.default,
        torch.ops.lamella.cached_head_scan.default,
        torch.ops.lamella.grouped_linear.default,
    }
)
"""Operators that are called, not traced: their loops depend on the data or the length."""


class AotExecutable(Executable):
    """A compiled graph; its weights lie in memory once, shared with the portable graph."""

    backend = "aot"

    def __init__(
        self,
        portable: Portable,
        package: Path,
        signature: Signature,
        report: Report | None,
        integers: Integers = "floats",
    ) -> None:
        """Load the machine code of `package` and give it the weights of `portable`."""
        super().__init__(signature, report, portable.inputs)
        self._portable = portable
        self._package = package
        self._integers = integers
        self._compiled = load_package(package)
        # The compiled code keeps pointers only: the tensors must live as long as it does.
        held = dict(_traceable(portable, integers).named_buffers())
        self._weights = {name: held[name] for name in self._compiled.get_constant_fqns()}
        self._compiled.load_constants(self._weights, check_full_update=True, user_managed=True)

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """The flat outputs of flat inputs."""
        check_inputs(self.inputs, values)
        with torch.inference_mode():
            return self._compiled(*values)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        return self._portable.weight_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the files that `save` writes."""
        return self._portable.file_bytes + self._package.stat().st_size

    def write_files(self, folder: Path) -> Mapping[str, Any]:
        """Write the portable graph and the package beside it."""
        self._portable.write(folder)
        shutil.copyfile(self._package, folder / PACKAGE)
        return {"machine": machine(), "integers": self._integers}


@dataclass(frozen=True)
class AotBackend(Backend):
    """Compiles graphs ahead of time with AOTInductor; needs a C++ compiler.

    Products of 8-bit integers run in a kernel of integers that compiled code calls. Other weights
    of few bits are unpacked once: the kernel of 4 bits of PyTorch multiplies in bfloat16, which
    is an approximation that only the eager backend offers, to who asks for it.

    Attributes:
        integers: What multiplies integers: ``"traced"``, or ``"floats"``, in which products of 8
            bits are as exact.
        slow_kernels: Use kernels that are slower than floats on this machine too.
    """

    name: ClassVar[str] = "aot"

    integers: Integers = "traced"
    slow_kernels: bool = False

    def __post_init__(self) -> None:
        if self.integers == "onednn":
            raise ValueError(
                "integers must be 'traced' or 'floats' for the aot backend: weights in the layout "
                "of oneDNN can't be traced"
            )

    def formats(self) -> Sequence[QuantFormat]:
        """The formats of weights that compiled code has kernels for."""
        return tuple(of_integers(self.integers))

    def trial(self) -> EagerBackend:
        """The same kernels, without a compiler around them."""
        return EagerBackend(integers=self.integers)

    def without(self, format: QuantFormat) -> AotBackend | None:
        """Products of integers are exact in floats too."""
        if self.integers == "floats" or format.operator not in INTEGERS:
            return None
        return replace(self, integers="floats")

    def ensure_available(self) -> None:
        """Refuse when there is no C++ compiler.

        Raises:
            BackendError: Neither ``$CXX`` nor ``g++`` is there.
        """
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise BackendError(
                f"the aot backend needs a C++ compiler and {compiler!r} is not on the PATH; "
                f"install g++, or set CXX to another one"
            )

    def unsupported(self, graph: Graph) -> dict[str, int]:
        """Operators that are not canonical; everything canonical compiles."""
        return not_canonical(graph)

    def lower(self, graph: Graph, report: Report | None = None) -> AotExecutable:
        """Compile `graph`; takes from seconds to minutes.

        Raises:
            UnsupportedError: Some operators are not canonical.
            BackendError: There is no compiler, or it fails.
        """
        self.ensure_available()
        self.check(graph)
        portable = Portable.of(graph)
        return _compiled(portable, graph.signature, report, self.integers)

    def load(self, artifact: Artifact) -> AotExecutable:
        """The executable in a folder; compiled again on another kind of machine.

        Raises:
            ArtifactError: The folder is corrupt.
            BackendError: It must be compiled again, and there is no compiler.
        """
        described = artifact.description
        report = None if described.report is None else Report.from_json(described.report)
        signature = Signature.from_json(described.signature)
        portable = Portable.read(artifact.folder)
        # What was saved without saying so holds codes of integers as floats.
        integers: Integers = described.details.get("integers", "floats")
        package = artifact.folder / PACKAGE
        if described.details.get("machine") != machine() or not package.is_file():
            logger.warning(
                "%s was compiled for %s, this is %s: compiling it again",
                artifact.folder,
                described.details.get("machine"),
                machine(),
            )
            self.ensure_available()
            return _compiled(portable, signature, report, integers)
        return AotExecutable(portable, package, signature, report, integers)


def machine() -> str:
    """What a package is bound to: PyTorch, system, processor and its vector instructions."""
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__} {platform.system()} {platform.machine()} {vectors}"


def _compiled(
    portable: Portable, signature: Signature, report: Report | None, integers: Integers
) -> AotExecutable:
    """Compile into a folder that goes when the executable goes."""
    folder = Path(tempfile.mkdtemp(prefix="lamella-aot-"))
    try:
        package = _compile(portable, folder / PACKAGE, integers)
        executable = AotExecutable(portable, package, signature, report, integers)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(executable, shutil.rmtree, folder, ignore_errors=True)
    return executable


def called_operators(graph: Graph) -> dict[str, int]:
    """Operators of Lamella that compiled code calls, with their counts: it needs this library."""
    called = [node.target for node in graph.nodes if node.target in _KEPT]
    return dict(Counter(map(str, called)))


def compile_whole(portable: Portable, package: Path) -> Path:
    """Compile the graph with its weights into the file `package`; PyTorch alone runs it.

    Raises:
        BackendError: The compiler fails.
    """
    return _compile(portable, package, "traced", with_weights=True)


def _compile(
    portable: Portable, package: Path, integers: Integers, *, with_weights: bool = False
) -> Path:
    """Compile the graph, without its weights unless asked for, into the file `package`."""
    module = _traceable(portable, integers)
    # Sizes above 1, and different ones, so that no size becomes a constant.
    sample = tuple(example_inputs(portable.inputs, batch=2, sequence=16))
    shapes = tuple(
        {axis: Dim.AUTO for axis, size in enumerate(spec.shape) if isinstance(size, str)} or None
        for spec in portable.inputs
    )
    with warnings.catch_warnings(), torch.no_grad():
        # Inductor warns about its own deprecated names.
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(module, sample, dynamic_shapes=shapes, strict=False)
            return compile_package(program, package, with_weights=with_weights)
        except Exception as error:
            raise BackendError(
                f"AOTInductor can't compile the graph ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0][:300]}); use the eager backend"
            ) from error


def _traceable(portable: Portable, integers: Integers) -> fx.GraphModule:
    """The module with dense weights, and references in place of operators of Lamella."""
    module = lowered(portable.module(), Kernels(integers)).module
    references = {**REFERENCE, **CACHED_REFERENCE, **ADJOINT_REFERENCE, **ATTENTION_REFERENCE}
    references |= INTEGER_REFERENCE
    references |= ROUNDING_REFERENCE
    for node in module.graph.nodes:
        if node.target in references and node.target not in _KEPT:
            node.target = references[node.target]
    module.recompile()
    return module
