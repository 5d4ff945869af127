"""``lamella formats``: in what formats weights can be held on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lamella.cli.console import Stages, err, errors_in_one_line, out, show_json, table_of
from lamella.cli.lazy import api, machine, probes

if TYPE_CHECKING:
    from lamella.tuning.probes import Probe

_SAMPLE = (1024, 1024)
_TIMES = ("µs", "without")
_NARROW = (
    "3, 5 and 6 bits have no kernel: such weights are held in 4, 8 and 8 bits and stored in their "
    "own width by checkpoints"
)


@errors_in_one_line()
def list_formats(
    backend: Annotated[
        str, typer.Option("--backend", "-b", help="onnxruntime, eager, eager-bfloat16, ….")
    ] = "onnxruntime",
    store: Annotated[
        Path | None, typer.Option(help="Folder for what was found; default: in the user's cache.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Try what is known once more.")] = False,
    all_: Annotated[bool, typer.Option("--all", help="Also what is not offered, and why.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the formats of weights whose kernels are right and faster than floats here."""
    with Stages() as stage:
        stage("trying kernels")
        lowering = api.find_backend(backend)
        lowering.ensure_available()
        prober = probes.Prober(
            lowering,
            store,
            again=again,
            progress=lambda done, total: stage(f"trying kernels, {done} of {total} done"),
        )
        found = prober.probes()
    for problem in prober.problems:
        err.print(f"warning: {problem}", style="yellow", markup=False)
    if as_json:
        show_json({"machine": machine.machine(), "formats": [_data(one) for one in found]})
        return
    shown = [one for one in found if all_ or not one.obstacle]
    out.print(_table(shown, f"{backend} on {machine.machine()}"))
    if len(shown) < len(found):
        out.print(f"{len(found) - len(shown)} more are not offered here; --all says why")
    out.print(_NARROW)


def _table(probes: list[Probe], title: str) -> Table:
    refused = any(one.obstacle for one in probes)
    columns = ("layer", "format", "bits/weight", "activations", "kernel", *_TIMES)
    table = table_of(title, *columns, *["not offered"] * refused, numbers=_TIMES)
    for one in probes:
        format = one.format
        cells = (
            format.role,
            format.name,
            f"{_bits(one):.4g}",
            format.activations,
            format.kernel,
            f"{one.seconds * 1e6:.4g}",
            f"{one.dense_seconds * 1e6:.4g}",
        )
        table.add_row(*cells, *([one.obstacle] if refused else []))
    return table


def _bits(probe: Probe) -> float:
    """Bits of a weight of a large layer, with scales and zeros."""
    return 8 * probe.format.weight_bytes(_SAMPLE) / (_SAMPLE[0] * _SAMPLE[1])


def _data(probe: Probe) -> dict[str, Any]:
    format = probe.format
    return {
        "layer": format.role,
        "format": format.name,
        "bits": format.bits,
        "block": format.block,
        "symmetric": format.symmetric,
        "scales": None if format.scales is None else str(format.scales).removeprefix("torch."),
        "activations": format.activations,
        "kernel": format.kernel,
        "bits_per_weight": _bits(probe),
        "off": probe.off,
        "tolerance": format.tolerance,
        "seconds": probe.seconds,
        "dense_seconds": probe.dense_seconds,
        "offered": not probe.obstacle,
        "reason": probe.obstacle,
    }
