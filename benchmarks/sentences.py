"""Sentences of English that any machine has: docstrings of the installed packages.

The order is fixed by a hash, so that calibration and held-out sentences are the same on every
machine with the same packages, and never overlap.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("numpy", "scipy", "sklearn", "networkx", "sympy")
FILES = 100
"""Files that are read of each package: enough for thousands of sentences in a few seconds."""

_SENTENCE = re.compile(r"\b[A-Z][a-zA-Z ,'-]{40,200} [a-z]{3,}\.")


def sentences(count: int, *, skip: int = 0) -> list[str]:
    """`count` distinct sentences, after `skip` others.

    Raises:
        ValueError: The installed packages hold fewer.
    """
    found = sorted(set(_all()), key=lambda s: hashlib.sha256(s.encode()).digest())
    if len(found) < skip + count:
        raise ValueError(f"the installed packages hold {len(found)} sentences, not {skip + count}")
    return found[skip : skip + count]


def _all() -> Iterator[str]:
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        for path in sorted(Path(spec.origin).parent.rglob("*.py"))[:FILES]:
            yield from _of_file(path)


def _of_file(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old code about its escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            text = " ".join((ast.get_docstring(node) or "").split())
            yield from _SENTENCE.findall(text)
