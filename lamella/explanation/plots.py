"""Pictures of explanations: the package `matplotlib`, imported when one is drawn."""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lamella.errors import BackendError, SamplesError
from lamella.explanation.summary import Bar, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 64
"""Images that fit into one picture."""

_COLORS = "seismic"
"""White for nothing, red for what speaks for the target, blue for what speaks against."""


def is_installed() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def check_installed() -> None:
    """Refuse to draw where matplotlib is missing.

    Raises:
        BackendError: It is.
    """
    if not is_installed():
        raise BackendError(
            "pictures need the package matplotlib; install it with pip install 'lamella[plots]'"
        )


def pixel_maps(relevance: Tensor, images: Tensor | None, title: str) -> bytes:
    """A PNG with a map for each image: red speaks for the target, blue against it.

    Colors are symmetric around zero and reach to the largest relevance of each image.

    Args:
        relevance: ``[rows, height, width]``.
        images: ``[rows, channels, height, width]``: the maps are drawn over them, in gray and
            stretched from black to white; None draws the maps alone.
        title: Of the picture.

    Raises:
        BackendError: Matplotlib is not installed.
        SamplesError: There are too many images for one picture.
    """
    count = len(relevance)
    if count > MOST:
        raise SamplesError(f"{count} images are too many for one picture; draw at most {MOST}")
    columns = min(count, 8)
    rows = math.ceil(count / columns)
    figure = _figure(1.2 + 3.0 * columns, 0.6 + 2.8 * rows)
    for row in range(count):
        axes: Axes = figure.add_subplot(rows, columns, row + 1)
        values = relevance[row].detach().double()
        largest = float(values.abs().max()) or 1.0
        drawn = axes.imshow(values.numpy(), cmap=_COLORS, vmin=-largest, vmax=largest)
        if images is not None:
            axes.imshow(_over(drawn, values / largest, images[row]).numpy())
        axes.set_axis_off()
        figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)
    figure.suptitle(_shown(title), parse_math=False, fontsize=10)
    return _png(figure)


def _over(drawn: Any, strength: Tensor, image: Tensor) -> Tensor:
    """The image in gray, and colors where there is relevance, ``[height, width, 3]``."""
    gray = image.detach().double().mean(0).unsqueeze(-1)
    gray = (gray - gray.min()) / (gray.max() - gray.min()).clamp_min(1e-300)
    colors = torch.from_numpy(drawn.to_rgba(drawn.get_array())[..., :3])
    weight = strength.abs().unsqueeze(-1)
    return (gray * (1 - weight) + colors * weight).clamp(0, 1)


def bars(summary: Summary) -> bytes:
    """A PNG with bars of blocks, branches and heads.

    Raises:
        BackendError: Matplotlib is not installed.
        SamplesError: The model has no blocks, branches or heads.
    """
    parts = [bool(summary.blocks), bool(summary.branches), bool(summary.heads)]
    if not any(parts):
        raise SamplesError("the model has no blocks, branches or heads that could be drawn")
    longest = max(len(summary.blocks), len(summary.branches), len(summary.heads))
    figure = _figure(5.0 * sum(parts), min(1.6 + 0.24 * longest, 100.0))
    drawn = iter(range(1, 4))
    if summary.blocks:
        _bars(figure.add_subplot(1, sum(parts), next(drawn)), summary.blocks, "adds, by block")
    if summary.branches:
        _bars(figure.add_subplot(1, sum(parts), next(drawn)), summary.branches, "by branch")
    if summary.heads:
        _heads(figure, figure.add_subplot(1, sum(parts), next(drawn)), summary)
    figure.suptitle(_shown(summary.title), parse_math=False, fontsize=10)
    return _png(figure)


def _bars(axes: Axes, shown: tuple[Bar, ...], title: str) -> None:
    flows = [bar.flow for bar in shown]
    axes.barh(range(len(shown)), flows, color=["#c33" if f >= 0 else "#36c" for f in flows])
    _label(axes, [bar.name for bar in shown], title)
    axes.axvline(0, color="#111", linewidth=0.8)


def _heads(figure: Figure, axes: Axes, summary: Summary) -> None:
    widest = max(len(each.flows) for each in summary.heads)
    table = torch.full((len(summary.heads), widest), math.nan)
    for row, each in enumerate(summary.heads):
        table[row, : len(each.flows)] = torch.tensor(each.flows)
    largest = summary.largest_head
    drawn = axes.imshow(table.numpy(), cmap=_COLORS, vmin=-largest, vmax=largest, aspect="auto")
    _label(axes, [each.name for each in summary.heads], "by head")
    axes.set_xticks(range(0, widest, max(1, widest // 8)))
    figure.colorbar(drawn, ax=axes)


def _label(axes: Axes, names: list[str], title: str) -> None:
    shown = [_shown(name) for name in names]
    axes.set_yticks(range(len(names)), shown, fontsize=7, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(title, fontsize=9)


def _figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window and to no other figure; sizes in inches."""
    check_installed()
    figure: Figure = importlib.import_module("matplotlib.figure").Figure(
        (width, height), layout="constrained"
    )
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _shown(text: str) -> str:
    """`text` in letters that every font has."""
    return "".join(letter if letter < "\u0250" else f"\\u{ord(letter):04x}" for letter in text)
