"""Names of ONNX as names that a graph can hold.

The name of a weight is a dotted path of modules and becomes part of generated code, the name
of an input becomes a parameter of a function: letters, digits and underscores are kept, all
else is replaced.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

from torch import nn

_ANONYMOUS = re.compile(r"(onnx::\w+|val|constant|_val|const)_?\d*")
_MODULE_NAMES = frozenset(dir(nn.Module()))


class WeightNames:
    """Gives each weight a path of its own: no two alike, none below another."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._folders: set[str] = set()
        self._counts: dict[str, int] = {}

    def claim(self, wanted: str) -> str:
        """A free name, `wanted` if it can be."""
        base = self._below_no_weight(dotted(wanted))
        name = base
        while name in self._taken or name in self._folders:
            self._counts[base] = self._counts.get(base, 1) + 1
            name = f"{base}_{self._counts[base]}"
        self._taken.add(name)
        self._folders.update(_parents(name))
        return name

    def _below_no_weight(self, name: str) -> str:
        """``a.b.c`` as ``a.b_c`` if there is a weight ``a.b``."""
        path = ""
        for part in name.split("."):
            joint = "" if not path else "_" if path in self._taken else "."
            path = f"{path}{joint}{part}"
        return path


def dotted(name: str) -> str:
    """`name` as a path of attributes: ``encoder/layer.0::w`` -> ``encoder.layer.0.w``."""
    parts = [_plain(part) for part in re.split(r"[./]|::", name)]
    kept = [part for part in parts if part] or ["weight"]
    return ".".join(f"{part}_" if part in _MODULE_NAMES else part for part in kept)


def identifiers(names: Iterable[str]) -> list[str]:
    """Each name as a distinct Python identifier: ``input.1`` -> ``input_1``."""
    made: list[str] = []
    for name in names:
        base = _plain(name) or "input"
        if base[0].isdigit() or keyword.iskeyword(base) or base == "self":
            base = f"_{base}" if base[0].isdigit() else f"{base}_"
        unique, count = base, 1
        while unique in made:
            count += 1
            unique = f"{base}_{count}"
        made.append(unique)
    return made


def is_anonymous(name: str) -> bool:
    """Whether an exporter made the name up (``onnx::MatMul_123``, ``val_7``)."""
    return _ANONYMOUS.fullmatch(name) is not None


def scoped(node_name: str, leaf: str) -> str | None:
    """The name of a weight by where it is used: ``/a.0/query/MatMul`` -> ``a.0/query/weight``."""
    scope = node_name.strip("/").rpartition("/")[0]
    return f"{scope}/{leaf}" if scope else None


def _plain(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z_]", "_", text)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
