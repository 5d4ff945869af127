"""Tables: printed, kept as JSON beside the machine and the versions, and put into documents."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("lamella", "torch", "transformers", "onnxruntime", "onnx-ir", "numpy", "scipy")


@dataclass(frozen=True)
class Result:
    """One table of measurements.

    Attributes:
        name: File name without its ending, and the name in document markers.
        title: What was measured, with the conditions.
        columns: Heading of each column.
        rows: Cells; numbers stay numbers.
        notes: What a reader must know to judge the figures.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    notes: tuple[str, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())

    def show(self) -> None:
        """Print the table."""
        table = Table(*self.columns, title=self.title, caption="\n".join(self.notes))
        for row in self.rows:
            table.add_row(*map(_cell, row))
        Console(width=140).print(table)

    def publish(self) -> None:
        """Print the table and write it to ``benchmarks/results/NAME.json``."""
        self.show()
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def markdown(self) -> str:
        """The table for a document, with machine and versions below."""
        lines = ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in self.rows]
        versions = ", ".join(f"{k} {v}" for k, v in self.machine["versions"].items())
        where = f"{self.machine['cpu']}, {self.machine['cores']} cores"
        below = [f"*{self.title}. {where}; {versions}.*"]
        return "\n".join([*lines, "", *below, *(f"*{note}*" for note in self.notes)])


def load(name: str) -> Result:
    """The result that a script wrote before."""
    data = json.loads((RESULTS / f"{name}.json").read_text())
    return Result(**{**data, "columns": tuple(data["columns"]), "notes": tuple(data["notes"])})


def machine() -> dict[str, Any]:
    """Processor, cores and versions of what took part."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    python = platform.python_version()
    return {"cpu": _cpu(), "cores": os.cpu_count(), "python": python, "versions": versions}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
