"""The ONNX Runtime package: which one is installed, and what to do if it is none or two."""

from __future__ import annotations

import importlib.metadata
from types import ModuleType

from lamella.errors import ProviderError

_FLAVORS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
)


def installed_flavors() -> tuple[str, ...]:
    """The installed distributions that own the import package `onnxruntime`."""
    return tuple(name for name in _FLAVORS if _is_installed(name))


def import_onnxruntime() -> ModuleType:
    """The package, imported when it is needed for the first time.

    Raises:
        ProviderError: It is not installed, or two distributions overwrite each other.
    """
    flavors = installed_flavors()
    if len(flavors) > 1:
        keep = next((name for name in flavors if name != "onnxruntime"), flavors[0])
        raise ProviderError(
            f"{' and '.join(flavors)} are installed together and overwrite each other's files; "
            f"keep one: pip uninstall -y {' '.join(flavors)} && pip install {keep}"
        )
    try:
        import onnxruntime  # noqa: PLC0415
    except ImportError as error:
        raise ProviderError(
            f"the onnxruntime backend needs the package onnxruntime ({error}); install it with "
            f'pip install "lamella[cpu]" (or "lamella[gpu]")'
        ) from error
    return onnxruntime


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
