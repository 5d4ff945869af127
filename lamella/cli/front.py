"""A picture of a front of size or time against loss: matplotlib, imported when one is drawn."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.errors import LamellaError

if TYPE_CHECKING:
    from lamella.passes.analyses.pareto import ParetoReport

_ENDINGS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Refuse what can't be drawn, before anything is computed.

    Raises:
        LamellaError: matplotlib is missing.
        ValueError: The ending is none of a picture.
    """
    if path.suffix not in _ENDINGS:
        raise ValueError(f"a picture ends with {', '.join(_ENDINGS)}, got {path.name!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise LamellaError(
            "pictures need the package matplotlib; install it with pip install 'lamella[plots]'"
        )


def draw_front(report: ParetoReport, path: Path) -> None:
    """Write the losses of a front over what its plans take, predicted and measured."""
    figure: Any = importlib.import_module("matplotlib.figure").Figure(layout="constrained")
    axes = figure.subplots()
    in_time = bool(report.points) and report.points[0].milliseconds is not None
    over = [p.milliseconds if in_time else p.bytes / 1e6 for p in report.points]
    axes.plot(over, [p.predicted for p in report.points], marker=".", label="predicted")
    if report.points and report.points[0].measured is not None:
        axes.plot(over, [p.measured for p in report.points], marker=".", label="measured")
    axes.set(yscale="log", xlabel="ms a call" if in_time else "MB of weights", ylabel=report.unit)
    axes.legend(title=f"loss by {report.by}")
    figure.savefig(path)
