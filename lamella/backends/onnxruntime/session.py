"""A session of ONNX Runtime: created from a file, fed with tensors, nothing copied."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamella.backends.onnxruntime.packages import import_onnxruntime, installed_flavors
from lamella.backends.onnxruntime.threads import physical_cores, worker_cpus
from lamella.errors import BackendError, ProviderError

_log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"


class Session:
    """A model that ONNX Runtime has loaded, optimized and is ready to run.

    Attributes:
        provider: The execution provider in use.
        threads: Threads that compute one operator.
    """

    def __init__(
        self,
        path: Path,
        *,
        provider: str = CPU,
        threads: int | None = None,
        optimized: Path | None = None,
    ) -> None:
        """Load a model.

        Args:
            path: The ONNX file. Weights in a file beside it are mapped into memory.
            provider: Name of the execution provider; operators it lacks run on the CPU.
            threads: Threads for one operator; None means the physical cores.
            optimized: Where to write the optimized model, to look at it.

        Raises:
            ProviderError: The provider is missing or did not load.
            BackendError: ONNX Runtime refuses the model.
        """
        ort = import_onnxruntime()
        _check_available(ort, provider)
        self.threads = threads or physical_cores()
        options = _options(ort, self.threads, optimized)
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[provider])
        except _refusals(ort) as error:
            raise BackendError(
                f"onnxruntime {ort.__version__} refuses the model {str(path)!r}: {_told(error)}"
            ) from error
        self.provider = self._session.get_providers()[0]
        if self.provider != provider:
            raise ProviderError(
                f"onnxruntime fell back to {self.provider}: {provider} is built in but did not "
                f"load; see its log for the missing library, or ask for provider={CPU!r}"
            )
        # Silent fallback in the middle of a run would hide a broken provider.
        self._session.disable_fallback()
        self._ort = ort
        self.inputs: tuple[str, ...] = tuple(i.name for i in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
        """The outputs `names`; they own their memory, and share none with the inputs.

        Raises:
            BackendError: An operator failed, for example on sizes that do not fit together.
        """
        arrays = {name: _array_of(tensor) for name, tensor in feeds.items()}
        try:
            # The arrays that come back own the memory of the runtime: nothing is copied.
            results = self._session.run(list(names), arrays)
        except _refusals(self._ort) as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
            raise BackendError(
                f"onnxruntime failed on inputs of shape {shapes}: {_told(error)}"
            ) from error
        return [torch.from_numpy(array) for array in results]

    def bind(self) -> Bound:
        """A call whose inputs and outputs are bound to memory before it runs."""
        return Bound(self._session, _refusals(self._ort), self._ort.OrtValue)

    def last_size(self, output: str) -> int:
        """The last size of an output, which is a number in the file."""
        found = next(o for o in self._session.get_outputs() if o.name == output)
        return int(found.shape[-1])


class Bound:
    """A call of a session on memory of PyTorch: nothing is allocated and nothing copied.

    Numbers may be written into the tensors between runs; a tensor of another shape is bound anew.
    """

    def __init__(self, session: Any, refusals: tuple[type[Exception], ...], value: Any) -> None:
        """Made by `Session.bind`."""
        self._session, self._refusals, self._value = session, refusals, value
        self._binding = session.io_binding()
        # What is bound is not owned by the runtime.
        self._kept: dict[str, Tensor] = {}
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}

    def input(self, name: str, tensor: Tensor) -> None:
        """Read input `name` from a contiguous tensor on the CPU."""
        self._binding.bind_ortvalue_input(name, self._over(name, tensor))

    def output(self, name: str, tensor: Tensor) -> None:
        """Write output `name` into a contiguous tensor on the CPU."""
        self._binding.bind_ortvalue_output(name, self._over(name, tensor))

    def buffer(self, source: str, result: str, tensor: Tensor) -> None:
        """Read input `source` from a contiguous tensor on the CPU, and write `result` into it."""
        value = self._over(source, tensor)
        self._binding.bind_ortvalue_input(source, value)
        self._binding.bind_ortvalue_output(result, value)

    def tensor(self, name: str) -> Tensor:
        """What is bound as `name`."""
        return self._kept[name]

    def write(self, name: str, value: Tensor | int) -> None:
        """Put numbers into what is bound as `name`; for one number, faster than by PyTorch."""
        given = value if isinstance(value, int) else value.detach().cpu().numpy()
        self._arrays[name][...] = given

    def run(self) -> None:
        """Run on what is bound.

        Raises:
            BackendError: An operator failed, for example on sizes that do not fit together.
        """
        try:
            self._session.run_with_iobinding(self._binding)
        except self._refusals as error:
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in self._kept.items())
            raise BackendError(f"onnxruntime failed on {shapes}: {_told(error)}") from error

    def _over(self, name: str, tensor: Tensor) -> Any:
        if not tensor.is_contiguous():
            raise BackendError(f"the tensor for {name} has gaps in memory; pass a contiguous one")
        self._kept[name], self._arrays[name] = tensor, tensor.detach().numpy()
        return self._value.ortvalue_from_numpy(self._arrays[name])


def require(provider: str) -> None:
    """Refuse at once what a session would refuse later.

    Raises:
        ProviderError: The package or the provider is missing.
    """
    _check_available(import_onnxruntime(), provider)


def _check_available(ort: Any, provider: str) -> None:
    available = ort.get_available_providers()
    if provider not in available:
        raise ProviderError(
            f"{' '.join(installed_flavors()) or 'onnxruntime'} {ort.__version__} has no provider "
            f"{provider!r}, it has {', '.join(available)}; ask for one of these, or install "
            f'another package, e.g. pip install "lamella[gpu]" for CUDA'
        )


def _options(ort: Any, threads: int, optimized: Path | None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads may wait busily for the next operator, but not for the next call: between calls
    # the cores belong to whoever calls.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Counted from one.
    places = ";".join(str(cpu + 1) for cpu in worker_cpus(threads))
    if places:
        options.add_session_config_entry("session.intra_op_thread_affinities", places)
    # Errors become exceptions, whose messages repeat what would be logged.
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return options


def _refusals(ort: Any) -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime, which have no common base of their own."""
    state = ort.capi.onnxruntime_pybind11_state
    names = ("Fail", "InvalidArgument", "NoSuchFile", "NoModel", "EngineError", "InvalidProtobuf")
    names += ("RuntimeException", "ModelLoaded", "NotImplemented", "InvalidGraph", "EPFail")
    return tuple(getattr(state, name) for name in names if hasattr(state, name))


def _array_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a tensor, without its gradient; another device costs a copy."""
    return tensor.detach().to("cpu").contiguous().numpy()


def _told(error: Exception) -> str:
    """What ONNX Runtime says, as one line."""
    return " ".join(str(error).split())[:1000] or type(error).__name__
