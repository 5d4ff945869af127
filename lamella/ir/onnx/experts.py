"""Finds the linear layers of experts in the nodes that they are written as.

ONNX has no operator for rows that are sorted by expert. They are cut out, multiplied by the
matrix of their expert and put together again, followed by zeros for the rows that belong to
none; where the cuts are depends on data. Read node by node this would be a slice of unknown
length; here the whole is found at its last node, the ``Concat``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir


@dataclass(frozen=True)
class Experts:
    """Rows of one tensor, multiplied by the matrices of experts.

    Attributes:
        rows: The sorted rows, ``[rows, in]``.
        offsets: Where the rows of each expert end, ``[experts]``.
        matrices: A matrix ``[in, out]`` for each expert.
    """

    rows: ir.Value
    offsets: ir.Value
    matrices: tuple[ir.Value, ...]


@dataclass
class Found:
    """The experts of a graph.

    Attributes:
        layers: The last node of each layer, and what it stands for.
        inner: Nodes that only these layers read: they are not read one by one.
    """

    layers: dict[ir.Node, Experts] = field(default_factory=dict)
    inner: set[ir.Node] = field(default_factory=set)


def find_experts(graph: ir.Graph | ir.Function) -> Found:
    """The layers of experts in `graph`."""
    found = Found()
    for node in graph:
        if node.op_type == "Concat" and len(node.inputs) > 2:
            _add(node, found)
    return found


def _add(node: ir.Node, found: Found) -> None:
    products = [_made_by(value, "MatMul") for value in node.inputs[:-1]]
    matrices = [p.inputs[1] for p in products if p is not None]
    cuts = [_made_by(p.inputs[0], "Slice") for p in products if p is not None]
    kept = [cut for cut in cuts if cut is not None and len(cut.inputs) == 4]
    if not kept or len(kept) < len(products) or None in matrices:
        return
    rows, split = kept[0].inputs[0], _made_by(kept[0].inputs[2], "Split")
    if rows is None or split is None or len(split.outputs) != len(kept):
        return
    offsets, ends = split.inputs[0], list(split.outputs)
    if offsets is None or not all(cut.inputs[0] is rows for cut in kept):
        return
    follows = [cut.inputs[2] for cut in kept] == ends
    follows = follows and [cut.inputs[1] for cut in kept[1:]] == ends[:-1]
    rest = _rest(node.inputs[-1], ends[-1])
    if not follows or rest is None:
        return
    found.layers[node] = Experts(rows, offsets, tuple(m for m in matrices if m is not None))
    found.inner.update([*(p for p in products if p is not None), *kept, *rest])


def _made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _rest(value: ir.Value | None, end: ir.Value) -> Sequence[ir.Node] | None:
    """The nodes that make the zeros after the last row, if `value` is that."""
    cast = _made_by(value, "Cast")
    zeros = _made_by(cast.inputs[0] if cast else value, "ConstantOfShape")
    shape = _made_by(zeros.inputs[0], "Concat") if zeros else None
    length = _made_by(shape.inputs[0], "Sub") if shape else None
    if zeros is None or shape is None or length is None or length.inputs[1] is not end:
        return None
    return [node for node in (cast, zeros, shape, length) if node is not None]
