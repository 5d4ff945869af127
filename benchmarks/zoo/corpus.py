"""Text that any machine has: the Python sources of the installed packages, split by file."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "calibration", "selection", "test"]

PACKAGES = ("torch", "transformers", "sympy", "scipy", "numpy", "onnx", "hypothesis", "rich")
"""Packages that the project installs anyway, with the standard library the whole corpus."""


@dataclass(frozen=True)
class Corpus:
    """The files of each split.

    A file belongs to a split by the hash of its relative path, so that no file is in two, and
    a file of a new version stays where it was.

    Attributes:
        max_bytes: Files are taken in the order of their hash until this many bytes are read.
    """

    max_bytes: int = 24_000_000

    def files(self) -> list[tuple[str, Path]]:
        """Relative name and path of every file, in the order of the hash of the name."""
        roots = [(Path(sysconfig.get_paths()["stdlib"]), "stdlib", ("*.py", "*/*.py"))]
        site = Path(sysconfig.get_paths()["purelib"])
        roots += [(site / name, name, ("**/*.py",)) for name in PACKAGES]
        found = {
            f"{label}/{path.relative_to(root)}": path
            for root, label, globs in roots
            for pattern in globs
            for path in root.glob(pattern)
            if "site-packages" not in str(path.relative_to(root))
        }
        return sorted(found.items(), key=lambda item: _digest(item[0]))

    def texts(self, split: Split) -> Iterator[str]:
        """The text of each file of `split`; tiny and generated-looking files are left out."""
        total = 0
        for name, path in self.files():
            text = path.read_text(encoding="utf-8", errors="ignore")
            if not 500 <= len(text) <= 60_000:
                continue
            total += len(text)
            if total > self.max_bytes:
                return
            if split_of(name) == split:
                yield text

    def digest(self) -> str:
        """A digest of the names and sizes of the files."""
        sizes = [f"{name}:{path.stat().st_size}" for name, path in self.files()]
        return hashlib.sha256("\n".join(sizes).encode()).hexdigest()


def split_of(name: str) -> Split:
    """The split of a file: 85 % train, 5 % each of calibration, selection and test."""
    place = int(_digest("split:" + name)[:8], 16) % 100
    if place < 85:
        return "train"
    return "calibration" if place < 90 else "selection" if place < 95 else "test"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
