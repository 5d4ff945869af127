"""The text of a graph: stable, so that the diff of two texts is the diff of two graphs.

A node is called by its operator and its number among its like in the sublayer it belongs to
(``%2.attention.linear_3``), so that an edit in one block renames nothing in another. Blocks are
called by the number that is in the names of their weights: it stays when another block goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.blocks import block_labels
from lamella.ir.stream import Block
from lamella.ir.symbols import named, size_of, symbol_names

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_INDENT = "  "


@dataclass(frozen=True)
class Listing:
    """What the text of a graph is made of.

    Attributes:
        name: Of the architecture.
        outputs: Names of the outputs.
        weight_bytes: Bytes of the weights.
        nodes: All nodes of the graph, in order.
        blocks: Its blocks.
    """

    name: str
    outputs: Sequence[str]
    weight_bytes: int
    nodes: Sequence[Node]
    blocks: Sequence[Block]


def text_of(listing: Listing) -> str:
    """A graph as text: one line for each operator, blocks and sublayers as headings.

    Weights are called by name where they are read (``@lm_head.weight``). Nodes that belong to
    no block stand before the first block or behind the last one that they depend on.
    """
    return "\n".join(_Writer(listing).lines()) + "\n"


class _Writer:
    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._symbols = symbol_names(listing.nodes)
        self._sizes: dict[int, str] = {}
        self._labels = block_labels([block.name for block in listing.blocks])
        self._block = self._blocks()
        self._sublayer = {
            node: sublayer.name.removeprefix(f"{block.name}.")
            for block in reversed(listing.blocks)
            for sublayer in reversed(block.sublayers)
            for node in sublayer.nodes
        }
        self._names = self._named()

    def lines(self) -> Iterator[str]:
        yield self._title()
        nodes = self._listing.nodes
        for node in nodes:
            if node.op == "placeholder":
                yield f"{_INDENT}%{self._names[node]}: {self._type(node)}"
        sections: dict[tuple[int, bool], list[Node]] = {}
        for node in nodes:
            if node.op == "call_function":
                sections.setdefault(self._section(node), []).append(node)
        for (block, outside), members in sorted(sections.items()):
            yield from self._section_lines(block, outside, members)
        yield self._result()

    # ---- places and names ---------------------------------------------------------------

    def _blocks(self) -> dict[Node, int]:
        """For every node the block it is in, or the last one that it depends on (-1: none).

        A branch that is added twice is in two blocks; it is told in the first.
        """
        blocks = reversed(self._listing.blocks)
        own = {node: block.index for block in blocks for node in block.nodes}
        places: dict[Node, int] = {}
        for node in self._listing.nodes:
            sources = [places[source] for source in node.all_input_nodes]
            places[node] = own.get(node, max(sources, default=-1))
        self._inside = own.keys()
        return places

    def _section(self, node: Node) -> tuple[int, bool]:
        """The block, and whether `node` comes after it."""
        return self._block[node], node not in self._inside

    def _named(self) -> dict[Node, str]:
        names: dict[Node, str] = {}
        counts: Counter[str] = Counter()
        for node in self._listing.nodes:
            if node.op != "call_function":
                names[node] = str(node.target)
                continue
            stem = f"{self._prefix(node)}{_short(node.target)}"
            counts[stem] += 1
            names[node] = stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"
        return names

    def _prefix(self, node: Node) -> str:
        block, outside = self._section(node)
        if outside:
            return "" if block < 0 else "after."
        sublayer = self._sublayer.get(node)
        label = self._labels[block]
        return f"{label}.{sublayer}." if sublayer else f"{label}."

    # ---- lines --------------------------------------------------------------------------

    def _title(self) -> str:
        kinds = Counter(node.op for node in self._listing.nodes)
        operators, weights = kinds["call_function"], kinds["get_attr"]
        megabytes = self._listing.weight_bytes / 1e6
        return f"{self._listing.name}: {operators} operators, {weights} weights, {megabytes:.2f} MB"

    def _section_lines(self, block: int, outside: bool, members: list[Node]) -> Iterator[str]:
        if outside:
            yield "before the blocks" if block < 0 else f"after {self._heading(block)}"
            yield from (self._line(node, _INDENT) for node in members)
            return
        yield self._heading(block)
        heading = None
        for node in members:
            sublayer = self._sublayer.get(node)
            if sublayer and sublayer != heading:
                yield f"{_INDENT}{sublayer}"
            heading = sublayer
            yield self._line(node, _INDENT * 2 if sublayer else _INDENT)

    def _heading(self, block: int) -> str:
        found = self._listing.blocks[block]
        return " ".join(filter(None, (found.stack, "block", self._labels[block], found.name)))

    def _line(self, node: Node, indent: str) -> str:
        call = f"{_operator(node.target)}({', '.join(self._arguments(node))})"
        return f"{indent}%{self._names[node]}: {self._type(node)} = {call}"

    def _result(self) -> str:
        flat: Any = self._listing.nodes[-1].args[0]
        values, names = [self._value(value) for value in flat], self._listing.outputs
        if len(names) != len(values):
            return f"return {', '.join(values)}"
        pairs = zip(names, values, strict=True)
        return "return " + ", ".join(f"{name}={value}" for name, value in pairs)

    # ---- values -------------------------------------------------------------------------

    def _arguments(self, node: Node) -> Iterator[str]:
        names = ops.argument_names(node.target)
        defaults = ops.argument_defaults(node.target)
        for position, argument in enumerate(node.args):
            name = names[position] if position < len(names) else ""
            if position == 0 or not name:
                yield self._value(argument)
            elif isinstance(argument, Node) or name not in defaults or defaults[name] != argument:
                yield f"{name}={self._value(argument)}"
        for name, argument in node.kwargs.items():
            if isinstance(argument, Node) or name not in defaults or defaults[name] != argument:
                yield f"{name}={self._value(argument)}"

    def _value(self, value: Any) -> str:
        if isinstance(value, Node):
            return f"{'@' if value.op == 'get_attr' else '%'}{self._names[value]}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._value(item) for item in value)}]"
        if isinstance(value, torch.dtype):
            return _dtype(value)
        return str(value)

    def _type(self, node: Node) -> str:
        return self._type_of(node.meta.get("val"))

    def _type_of(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{_dtype(value.dtype)}[{', '.join(map(self._size, value.shape))}]"
        if isinstance(value, list | tuple):
            return f"({', '.join(map(self._type_of, value))})"
        if isinstance(value, torch.SymInt):
            return self._size(value)
        return "unknown" if value is None else type(value).__name__

    def _size(self, size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        # Sizes are shared between shapes: writing an expression takes longer than the rest.
        key = id(size.node)
        if key not in self._sizes:
            self._sizes[key] = named(size_of(size), self._symbols)
        return self._sizes[key]


def _operator(target: Any) -> str:
    return ops.op_name(target).removesuffix(".default")


def _short(target: Any) -> str:
    """``linear`` for ``aten.linear.default``."""
    return ops.op_name(target).split(".")[1]


def _dtype(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))
