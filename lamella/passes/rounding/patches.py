"""The Gram matrices of convolutions: of the patches that they multiply their weights with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from lamella.data import Samples
from lamella.errors import SamplesError
from lamella.ir.graph import Graph
from lamella.ir.segments import Values, program
from lamella.passes.rounding.gram import InputGram


def patch_grams(
    graph: Graph, samples: Samples, layers: Iterable[Node]
) -> Iterator[tuple[Node, InputGram]]:
    """``G = mean of p p^T`` over the patches p of each convolution, flat as its weight is.

    The samples run once, block by block; the matrices of one block are in memory.

    Args:
        graph: The model as it is.
        samples: Calibration inputs.
        layers: Convolutions without groups.

    Raises:
        SamplesError: The inputs of a layer hold NaN or infinite entries, or squares overflow.
    """
    wanted = list(layers)
    sums: dict[Node, Tensor] = {}
    counts: dict[Node, int] = dict.fromkeys(wanted, 0)

    def watch(node: Node, values: Values) -> None:
        if node in counts:
            rows = _patches(graph, node, values)
            product = rows.t() @ rows
            sums[node] = sums[node].add_(product) if node in sums else product
            counts[node] += len(rows)

    running = program(graph, wanted)
    states = [running.start(sample) for sample in samples]
    for segment in running.sweep(states, watch):
        for node in [node for node in segment.nodes if node in sums]:
            total = sums.pop(node)
            if not bool(torch.isfinite(total).all()):
                name = graph.operand(node, "weight").target
                raise SamplesError(
                    f"the samples give the input of {node.name}, which {name} multiplies, entries "
                    f"that are NaN or infinite, or whose squares overflow; look for inputs or "
                    f"weights that overflow"
                )
            yield node, InputGram(total.div_(counts[node]), counts[node])


def _patches(graph: Graph, node: Node, values: Values) -> Tensor:
    """What the kernel lies over, ``[places, in * kernel]``."""
    source = graph.operand(node, "input")
    image: Tensor = values[source].float()
    axes = image.ndim - 2
    kernel = [int(size) for size in graph.operand(node, "weight").meta["val"].shape[2:]]
    places: Mapping[str, Any] = {
        name: axis_values(graph.operand(node, name), axes)
        for name in ("stride", "padding", "dilation")
    }
    if axes == 1:
        image, kernel = image.unsqueeze(2), [1, *kernel]
        fill = {"stride": 1, "padding": 0, "dilation": 1}
        places = {name: [fill[name], *sizes] for name, sizes in places.items()}
    return functional.unfold(image, tuple(kernel), **places).transpose(1, 2).flatten(0, 1)


def axis_values(given: object, axes: int) -> list[int]:
    """One number for each axis of the kernel; a single one stands for all."""
    listed = [int(one) for one in given] if isinstance(given, list | tuple) else [int(given)]  # pyright: ignore
    return listed * axes if len(listed) == 1 else listed
