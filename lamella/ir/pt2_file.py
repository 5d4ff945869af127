"""Exported programs from ``.pt2`` files, read only after the file was found to hold data alone.

`torch.export.load` unpickles what it doesn't know, evaluates the expressions of sizes as Python
and loads compiled code. So the archive is checked first: no pickle that needs more than
``weights_only``, no custom objects, no machine code, and only arithmetic in expressions.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from lamella.errors import ModelFileError

_TARGET = re.compile(r"(torch\.ops(\.\w+){2,3}|_operator\.\w+|torch\.sym_\w+|math\.\w+)")
_QUOTED_OR_NUMBER = re.compile(r"'\w+'|\b\d+(\.\d+)?(e[+-]?\d+)?\b")
_PUNCTUATION = re.compile(r"[\w\s+\-*/%(),<>=&|!~]*")
_WORD = re.compile(r"[A-Za-z_]\w*")
_SYMBOL = re.compile(r"(u|s|zuf|zf)\d+")
_FUNCTIONS = frozenset(
    {
        *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Abs"),
        *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilDiv"),
        *("CeilToInt", "FloorToInt", "TruncToInt", "TruncToFloat", "RoundToInt", "RoundDecimal"),
        *("LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv"),
        *("ToFloat", "Identity", "Piecewise", "And", "Or", "Not", "Eq", "Ne", "Equality"),
        *("Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
        *("True", "False", "true", "false", "oo", "int_oo", "inf", "precision", "evaluate"),
        *("positive", "nonnegative", "negative", "integer", "real", "finite", "nonzero", "zero"),
        *("IsNonOverlappingAndDenseIndicator", "BooleanTrue", "BooleanFalse"),
    }
)
_FOLDERS = ("models/", "data/weights/", "data/constants/", "data/sample_inputs/", "extra/")
_FILES = (
    ".data/version",
    ".data/serialization_id",
    "archive_format",
    "archive_version",
    "byteorder",
    "version",
)


def read_program(path: Path) -> ExportedProgram:
    """The exported program in `path`.

    Raises:
        ModelFileError: The file is missing or corrupt, or holds more than data.
    """
    if not path.is_file():
        raise ModelFileError(f"there is no file {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            _check(archive, path)
    except (zipfile.BadZipFile, EOFError, OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ModelFileError(f"{str(path)!r} is not a file of torch.export.save ({e})") from e
    try:
        return torch.export.load(path)
    except Exception as error:
        raise ModelFileError(
            f"{str(path)!r} can't be read by torch.export.load ({type(error).__name__}: {error}); "
            f"save it again with this version of PyTorch"
        ) from error


def _check(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse what is not data."""
    for name in archive.namelist():
        # Everything lies in one folder named after the model.
        inner = name.partition("/")[2]
        if not inner.startswith(_FOLDERS) and inner not in _FILES:
            raise ModelFileError(
                f"{str(path)!r} holds {name!r}, which torch.export.save does not write; a "
                f"compiled package is machine code and is not read as a model"
            )
        if inner.startswith("models/"):
            _check_model(json.loads(archive.read(name)), path)
        elif inner.startswith("data/") and inner.endswith(".json"):
            _check_payloads(archive, name, path)
        elif inner.startswith("data/") and inner.endswith(".pt"):
            _check_pickle(archive, name, path)


def _check_payloads(archive: zipfile.ZipFile, config: str, path: Path) -> None:
    folder = config.rpartition("/")[0]
    for payload in json.loads(archive.read(config))["config"].values():
        name = str(payload["path_name"])
        if "custom_obj" in name or "opaque_obj" in name:
            raise ModelFileError(f"{str(path)!r} holds a pickled object ({name!r}), not only data")
        if payload["use_pickle"]:
            _check_pickle(archive, f"{folder}/{name}", path)


def _check_pickle(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    try:
        torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError) as error:
        raise ModelFileError(
            f"{str(path)!r} holds a pickle that is more than tensors ({name!r}); it is not read"
        ) from error


def _check_model(model: Any, path: Path) -> None:
    for key, value in _strings(model):
        if key == "target" and not _TARGET.fullmatch(value):
            raise ModelFileError(f"{str(path)!r} calls {value!r}, which is not an operator")
        if key == "expr_str" and not _is_arithmetic(value):
            raise ModelFileError(f"{str(path)!r} has a size that is not arithmetic: {value!r}")


def _is_arithmetic(text: str) -> bool:
    """Whether evaluating `text` as Python can do nothing but compute."""
    rest = _QUOTED_OR_NUMBER.sub("", text)
    known = all(word in _FUNCTIONS or _SYMBOL.fullmatch(word) for word in _WORD.findall(rest))
    return known and _PUNCTUATION.fullmatch(rest) is not None


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string below `value` with the key it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
