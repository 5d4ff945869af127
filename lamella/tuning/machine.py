"""What a measured time depends on beside the kernel: the machine and the versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from lamella.backends.base import Backend
from lamella.backends.onnxruntime.threads import physical_cores

TABLE_VERSION = 4
"""Of the way kernels are measured; figures of another version are not used."""

_SAME_KERNELS = frozenset({"threads", "scratch", "slow_kernels"})
"""Options of backends that change no kernel, or are told apart."""

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "torch")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_CPU_INFO = Path("/proc/cpuinfo")
_USUAL_CACHE_BYTES = 32 * 2**20
_SIZE = re.compile(r"(\d+)([KMG]?)")


def machine() -> str:
    """The processor and how many of its cores this process may use, in words."""
    cores = physical_cores()
    return f"{_processor()}, {cores} core{'s' if cores > 1 else ''}"


def environment_of(backend: Backend) -> str:
    """What figures have to agree in: machine, backend, threads and versions."""
    threads = getattr(backend, "threads", None)
    if threads is None:
        # Threads of PyTorch can be set; those of ONNX Runtime are as many as there are cores.
        merges = backend.name == "onnxruntime"
        threads = physical_cores() if merges else torch.get_num_threads()
    return environment(label_of(backend), threads)


def label_of(backend: Backend) -> str:
    """The backend, with those of its options that choose other kernels and are not the default."""
    told = [backend.name]
    if dataclasses.is_dataclass(backend):
        for field in dataclasses.fields(backend):
            value = getattr(backend, field.name)
            if field.name not in _SAME_KERNELS and value != field.default:
                told.append(f"{field.name}={value}")
    return " ".join(told)


def environment(backend: str, threads: int) -> str:
    """`environment_of` a backend that is named as in `label_of`."""
    versions = ", ".join(f"{name} {version}" for name in _PACKAGES if (version := _version(name)))
    return f"{machine()}; {backend}, {threads} threads; {versions}; table {TABLE_VERSION}"


def cache_bytes() -> int:
    """Size of the last cache before memory; 32 MiB where the system does not say."""
    sizes = [_read(path) for path in sorted(_CACHES.glob("index*/size"))]
    found = [_SIZE.fullmatch(text) for text in sizes]
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(m[1]) * units[m[2]] for m in found if m), default=_USUAL_CACHE_BYTES)


def _processor() -> str:
    """Name, family and model: a name such as "AMD EPYC" alone stands for several generations."""
    facts: dict[str, str] = {}
    for line in _read(_CPU_INFO).splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name", platform.processor() or platform.machine())
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
