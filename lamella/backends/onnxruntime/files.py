"""ONNX models on disk: one file, or a file and its weights beside it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

import onnx_ir as ir

from lamella.backends.artifact import check_space

MODEL = "model.onnx"
DATA = "model.onnx.data"
DECODER = "decoder.onnx"
"""The same model with its caches as buffers; it has its weights in the same file."""

_ONE_FILE_BYTES = 16 * 2**20
_SMALL_TENSOR_BYTES = 1024
_SPARE_BYTES = 2**20


class Scratch:
    """A folder for temporary files, which goes with this object.

    Attributes:
        path: The folder.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Make a folder below `parent`, or where the system has its temporary files."""
        self.path = Path(tempfile.mkdtemp(prefix="lamella-", dir=parent))
        # Not `TemporaryDirectory`, which warns when it is collected.
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the initializers: weights, and constants beside them."""
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def save_model(
    model: ir.Model, folder: Path, name: str = MODEL, *, shares_weights: bool = False
) -> None:
    """Write a model into a folder.

    Weights are read, written and forgotten one by one. A model of more than 16 MB has them in a
    file of their own, which ONNX Runtime maps into memory instead of reading it; so has one whose
    weights another model is to share (see `save_beside`).

    Raises:
        OSError: The disk is full, or the folder can't be written.
        GraphError: A weight has no data.
    """
    size = weight_bytes(model)
    check_space(folder, size + _SPARE_BYTES)
    try:
        if size <= _ONE_FILE_BYTES and not shares_weights:
            ir.save(model, folder / name)
        else:
            ir.save(
                model,
                folder / name,
                external_data=DATA,
                size_threshold_bytes=_SMALL_TENSOR_BYTES,
            )
    except OSError as error:
        error.add_note(f"while writing {size:,} bytes of weights to {str(folder)!r}")
        raise
    except ir.serde.SerdeError as error:
        # What went wrong in reading a weight says more than where in the file it was to go.
        raise _root_of(error) from error


def save_beside(model: ir.Model, folder: Path, other: str) -> None:
    """Write a model that has its weights where the model `other` of the folder has them.

    Raises:
        OSError: The disk is full, or the folder can't be written.
    """
    stored = ir.load(folder / other).graph.initializers
    for name, value in model.graph.initializers.items():
        twin = stored[name].const_value if name in stored else None
        held = value.const_value
        if isinstance(twin, ir.ExternalTensor) and held is not None and _alike(twin, held):
            value.const_value = twin
    ir.save(model, folder / MODEL)


def _alike(one: ir.TensorProtocol, two: ir.TensorProtocol) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape


def _root_of(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def files_in(folder: Path) -> list[Path]:
    """The files of a model, those that exist."""
    return [path for path in (folder / MODEL, folder / DATA, folder / DECODER) if path.is_file()]
