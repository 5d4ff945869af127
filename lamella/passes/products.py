"""The products with weights of a graph, as the kernels that a backend runs for them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.axes import merged_batch, sizes_with
from lamella.ir.graph import Graph
from lamella.ir.ops import aten, lam
from lamella.ir.quantize import Format
from lamella.passes.times import Kernel, Kind, Times, Workload, generates, stored

_WEIGHTS = {
    aten.linear.default: "weight",
    lam.linear_nbits.default: "packed",
    lam.linear_int8.default: "weight",
    lam.linear_int8_static.default: "weight",
}


@dataclass(frozen=True)
class Product:
    """A linear layer.

    Attributes:
        node: The layer.
        weight: Name of the weight that it reads, or of its codes.
        source: What it multiplies.
        kernel: The kernel for the weight as it is stored.
        meets: What layers must agree in, beside the format, to be merged; None for one that is
            never merged.
    """

    node: Node
    weight: str
    source: Node
    kernel: Kernel
    meets: tuple[object, ...] | None


def products_of(graph: Graph, workload: Workload, times: Times) -> tuple[Product, ...]:
    """The linear layers of `graph` whose weights are constant, in order.

    Rows follow from the shapes of the graph: sizes of the batch are those of `workload`, all
    others its tokens. The head of a model that generates sees the last token only.
    """
    sizes = _Sizes(graph, workload)
    nodes = [node for node in graph.nodes if node.target in _WEIGHTS and _constant(node)]
    entries = sum(_shape(node)[0] * _shape(node)[1] for node in nodes)
    cold = 2 * entries > times.cache_bytes
    found = [_product(node, sizes, cold) for node in nodes]
    if workload.past is not None and generates(graph) and found:
        head = found[-1]
        rows = dataclasses.replace(head.kernel, rows=workload.batch)
        found[-1] = dataclasses.replace(head, kernel=rows)
    return tuple(found)


def kernels_of(
    products: Iterable[Product], merged: bool, plan: Mapping[str, Format] | None = None
) -> Counter[Kernel]:
    """What runs for some products, and how often.

    Args:
        products: From `products_of`.
        merged: Whether layers on one input are one kernel.
        plan: Formats of weights that are still as they were, by name.
    """
    plan = {} if plan is None else plan
    alike: dict[tuple[object, ...], list[Kernel]] = {}
    rounded: set[tuple[Node, Kernel]] = set()
    for product in products:
        kernel = product.kernel
        if product.weight in plan and kernel.kind == "linear":
            kernel = stored(kernel, plan[product.weight])
        form = (product.meets, dataclasses.replace(kernel, outputs=0))
        if not merged or product.meets is None:
            form = (product.node,)
        alike.setdefault(form, []).append(kernel)
        if kernel.kind.startswith("int8"):
            rounded.add((product.source, _rounding(kernel)))
    found = Counter(map(_merged, alike.values()))
    found.update(kernel for _, kernel in rounded)
    return found


def _merged(kernels: Sequence[Kernel]) -> Kernel:
    return dataclasses.replace(kernels[0], outputs=sum(kernel.outputs for kernel in kernels))


def _rounding(kernel: Kernel) -> Kernel:
    kind: Kind = "rounding-rows" if kernel.kind == "int8-rows" else "rounding-tensor"
    return dataclasses.replace(kernel, kind=kind, outputs=0, cold=False)


@dataclass(frozen=True)
class _Sizes:
    """Numbers for the symbolic sizes of a graph."""

    graph: Graph
    workload: Workload

    def rows(self, source: Node) -> int:
        merged = merged_batch(self.graph)
        batch = set(merged.values())
        *leading, _ = sizes_with(source, merged)
        size: Any = sympy.prod(leading)
        given = {s: self._size(s in batch) for s in size.free_symbols}
        return max(1, int(size.xreplace(given)))

    def _size(self, is_batch: bool) -> sympy.Integer:
        return sympy.Integer(self.workload.batch if is_batch else self.workload.tokens)


def _product(node: Node, sizes: _Sizes, cold: bool) -> Product:
    bound = ops.bind(node)
    weight, source = bound[_WEIGHTS[node.target]], bound["input"]  # pyright: ignore[reportArgumentType]
    outputs, inputs = _shape(node)
    dtype = str(source.meta["val"].dtype).removeprefix("torch.")
    kind, bits, block = _kind(node, bound)
    symmetric = bound.get("zero_points") is None
    kernel = Kernel(kind, inputs, outputs, sizes.rows(source), dtype, bits, block, symmetric, cold)
    alone = len(weight.users) == 1 and kind in ("linear", "nbits")
    meets = (source, bound["bias"] is None) if alone else None
    return Product(node, str(weight.target), source, kernel, meets)


def _kind(node: Node, bound: Mapping[str, Any]) -> tuple[Kind, int, int]:
    if node.target is lam.linear_nbits.default:
        return "nbits", int(bound["bits"]), int(bound["block"])
    if node.target is lam.linear_int8.default:
        return ("int8-rows" if bound["per_row"] else "int8-tensor"), 0, 0
    if node.target is lam.linear_int8_static.default:
        return "int8-tensor", 0, 0
    return "linear", 0, 0


def _shape(node: Node) -> tuple[int, int]:
    """``(out, in)`` of the weight of a linear layer."""
    bound = ops.bind(node)
    outputs = int(bound[_WEIGHTS[node.target]].meta["val"].shape[0])  # pyright: ignore[reportArgumentType]
    return outputs, int(bound["input"].meta["val"].shape[-1])


def _constant(node: Node) -> bool:
    weight = ops.bind(node)[_WEIGHTS[node.target]]  # pyright: ignore[reportArgumentType]
    return isinstance(weight, Node) and weight.op == "get_attr"
