"""What the weights of a graph are stored in, read back from its operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from lamella.ir import ops
from lamella.ir.graph import Graph
from lamella.ir.ops import lam
from lamella.ir.plan import Plan, PlanEntry, PlanOrigin
from lamella.ir.quantize import Format, weight_bytes

_PACKED = {lam.linear_nbits.default: "packed", lam.embedding_nbits.default: "packed"}
_SUFFIX = "_packed"
_CODES = "_codes"


def stored_plan(graph: Graph) -> Plan | None:
    """The plan that a graph was quantized by; None where no weight is stored in few bits.

    Formats are those of the operators. What is known beside them (losses, groups, quantizers)
    comes from the plan that was made for the graph, where it says the same format.
    """
    made = graph.plan_made
    entries: dict[str, PlanEntry] = {}
    for node in graph.nodes:
        found = _entry(node)
        if found is not None:
            name, entry = found
            known = None if made is None else made.entries.get(name)
            entries[name] = entry if known is None or not _same(known, entry) else known
    if not entries:
        return None
    if made is not None:
        entries = {n: e for n, e in made.entries.items() if e.format.bits == 32} | entries
    return Plan(entries, PlanOrigin() if made is None else made.origin)


def _same(known: PlanEntry, stored: PlanEntry) -> bool:
    """Whether a stored format is the one that was planned; kernels may read wider codes."""
    wide = replace(known.format, bits=known.format.kernel_bits)
    return wide == stored.format and known.shape == stored.shape


def _entry(node: Node) -> tuple[str, PlanEntry] | None:
    if node.target in _PACKED:
        bound = ops.bind(node)
        return _of_codes(bound, _PACKED[node.target])  # pyright: ignore[reportArgumentType]
    if node.target in (lam.linear_int8.default, lam.linear_int8_static.default):
        return _of_integers(ops.bind(node))
    return None


def _of_codes(bound: dict[str, Any], operand: str) -> tuple[str, PlanEntry] | None:
    packed, scales = bound[operand], bound["scales"]
    if packed.op != "get_attr" or not str(packed.target).endswith(_SUFFIX):
        return None
    symmetric, dtype = bound.get("zero_points") is None, scales.meta["val"].dtype
    format = Format(int(bound["bits"]), int(bound["block"]), symmetric, dtype)
    features = bound.get("features") or bound["input"].meta["val"].shape[-1]
    shape = (int(packed.meta["val"].shape[0]), int(features))
    name = str(packed.target).removesuffix(_SUFFIX)
    return name, PlanEntry(format, shape, weight_bytes(shape, format))


def _of_integers(bound: dict[str, Any]) -> tuple[str, PlanEntry] | None:
    codes = bound["weight"]
    if codes.op != "get_attr" or not str(codes.target).endswith(_CODES):
        return None
    out, inp = (int(size) for size in codes.meta["val"].shape)
    name = str(codes.target).removesuffix(_CODES)
    # Read back as blocks of 8 bits, from which integers for `activations` are made again.
    return name, PlanEntry(Format(8), (out, inp), out * inp + 4 * out, quantizer="int8")
