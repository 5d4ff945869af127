"""The kernels that a graph could use, in every format and for several numbers of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lamella.errors import closest
from lamella.ir.graph import Graph
from lamella.ir.packing import WIDTHS
from lamella.ir.quantize import USUAL_BLOCKS, Format, blocks_of
from lamella.passes.products import kernels_of, products_of
from lamella.passes.times import Kernel, Times, Workload, stored

FORMATS = ("fp32", *(f"{bits}/{block}" for bits in WIDTHS for block in USUAL_BLOCKS), "int8")
"""What is measured where nobody says what."""

ROWS = (1, 16, 128)
"""For how many rows."""

_GRID = re.compile(r"(\d+)/(\d+)(z?)")
_OTHERS = ("fp32", "int8", "int8-rows")


@dataclass(frozen=True)
class Line:
    """A shape of weights in a format.

    Attributes:
        inputs: Columns.
        outputs: Rows, of all layers that are merged.
        format: As in `FORMATS`; with a ``z`` for zero points.
        seconds: Rows of activations -> median time.
        weight_bytes: What a kernel reads of the weights.
    """

    inputs: int
    outputs: int
    format: str
    seconds: Mapping[int, float]
    weight_bytes: int

    @property
    def bandwidth(self) -> float:
        """Bytes of weights a second, for the fewest rows."""
        return self.weight_bytes / self.seconds[min(self.seconds)]


def survey(
    graph: Graph,
    times: Times,
    formats: Sequence[str] = FORMATS,
    rows: Sequence[int] = ROWS,
) -> tuple[Line, ...]:
    """The time of every distinct shape of the linear layers of `graph`.

    Raises:
        ValueError: A format is unknown, or a number of rows is less than 1.
    """
    check_formats(formats)
    if not rows or min(rows) < 1:
        raise ValueError(f"rows must be at least 1, got {', '.join(map(str, rows)) or 'none'}")
    found = {
        (shape, format): [_as(replace(shape, rows=count), format) for count in rows]
        for shape in _shapes(graph, times)
        for format in formats
    }
    wanted = [kernel for kernels in found.values() for kernel in kernels]
    roundings = [_rounding(kernel) for kernel in wanted if kernel.kind.startswith("int8")]
    known = times.seconds([*wanted, *roundings])
    return tuple(
        Line(
            shape.inputs,
            shape.outputs,
            format,
            {kernel.rows: known[kernel] for kernel in kernels},
            kernels[0].weight_bytes,
        )
        for (shape, format), kernels in found.items()
    )


def check_formats(formats: Sequence[str]) -> None:
    """Refuse formats that there are not.

    Raises:
        ValueError: It names them.
    """
    for format in formats:
        if format in _OTHERS:
            continue
        found = _GRID.fullmatch(format)
        if found and int(found[1]) in WIDTHS and int(found[2]) in blocks_of(int(found[1])):
            continue
        known = (*FORMATS, "int8-rows")
        raise ValueError(
            f"there is no format {format!r}{closest(format, known)}; there are "
            f"{', '.join(known)}, and grids with zero points such as 4/32z, or of 4 and 8 bits in "
            f"blocks of 256"
        )


def _shapes(graph: Graph, times: Times) -> list[Kernel]:
    """Kernels of the linear layers as they are, the distinct ones, for one row."""
    workload = Workload.of(graph)
    counts = kernels_of(
        products_of(graph, workload, times), times.merges and workload.past is not None
    )
    plain = [kernel for kernel in counts if kernel.kind == "linear"]
    return list(dict.fromkeys(replace(kernel, rows=1) for kernel in plain))


def _as(kernel: Kernel, format: str) -> Kernel:
    """The kernel for the same shape in another format."""
    if format == "fp32":
        return kernel
    if format.startswith("int8"):
        kind = "int8-rows" if format == "int8-rows" else "int8-tensor"
        return replace(kernel, kind=kind, dtype=kernel.dtype)
    found = _GRID.fullmatch(format)
    assert found is not None
    return stored(kernel, Format(int(found[1]), int(found[2]), not found[3]))


def _rounding(kernel: Kernel) -> Kernel:
    kind = "rounding-rows" if kernel.kind == "int8-rows" else "rounding-tensor"
    return replace(kernel, kind=kind, outputs=0, cold=False)
