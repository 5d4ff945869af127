"""Which linear layers are faster as products of integers, by the measured times of both kernels."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from lamella.ir.graph import Graph
from lamella.ir.quantize import Format
from lamella.passes.products import Product, products_of
from lamella.passes.sites import Site
from lamella.passes.times import Kernel, Kind, Times, Workload, generates, stored


def not_faster(
    graph: Graph, times: Times, formats: Mapping[Site, Format], *, per_row: bool
) -> frozenset[str]:
    """The weights whose layers take no less time as products of integers.

    One input of the usual length is read. Rounding it is shared by the layers that read it.

    Args:
        graph: The graph, its weights as they were.
        times: Who knows the times.
        formats: What every site would be stored in.
        per_row: Whether each row gets a scale.

    Raises:
        PassError: A time is missing and can't be measured.
    """
    workload = Workload.of(graph, past=0 if generates(graph) else None)
    wanted = {site.weight: format for site, format in formats.items() if format.bits == 8}
    found = [p for p in products_of(graph, workload, times) if p.weight in wanted]
    readers = Counter(product.source for product in found)
    kinds: tuple[Kind, Kind] = (
        ("int8-rows", "rounding-rows") if per_row else ("int8-tensor", "rounding-tensor")
    )
    rivals = {p: (stored(p.kernel, wanted[p.weight]), *_integers(p, kinds)) for p in found}
    known = times.seconds(kernel for kernels in rivals.values() for kernel in kernels)
    saved: dict[str, float] = dict.fromkeys(wanted, 0.0)
    for product, (codes, integers, rounding) in rivals.items():
        shared = known[rounding] / readers[product.source]
        saved[product.weight] += known[codes] - known[integers] - shared
    return frozenset(weight for weight, seconds in saved.items() if seconds <= 0)


def _integers(product: Product, kinds: tuple[Kind, Kind]) -> tuple[Kernel, Kernel]:
    kernel = dataclasses.replace(product.kernel, kind=kinds[0])
    return kernel, dataclasses.replace(kernel, kind=kinds[1], outputs=0, cold=False)
