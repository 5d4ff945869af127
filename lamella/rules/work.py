"""What one operation costs, and the view of it that cost rules read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor
from torch.fx import Node

from lamella.ir import ops
from lamella.ir.symbols import size_of

Expr = sympy.Expr
Sizes = tuple[Expr, ...]

ZERO: Expr = sympy.Integer(0)


@dataclass(frozen=True)
class Work:
    """What one operation costs, over the symbolic sizes of the inputs.

    Attributes:
        flops: Floating point (or integer) operations; a multiply-add is 2.
        contraction_flops: The part of `flops` in matrix products and convolutions.
        read_bytes: Activations read.
        written_bytes: Activations written.
        weight_bytes: Weights read; the rows that are picked, for an embedding.
        cache_bytes: What a decoder keeps of this operation for the next token.
    """

    flops: Expr = ZERO
    contraction_flops: Expr = ZERO
    read_bytes: Expr = ZERO
    written_bytes: Expr = ZERO
    weight_bytes: Expr = ZERO
    cache_bytes: Expr = ZERO


@dataclass(frozen=True)
class Call:
    """A node with its sizes as expressions over readable symbols.

    Attributes:
        node: The node.
        names: Symbol of the trace -> readable symbol.
    """

    node: Node
    names: Mapping[sympy.Symbol, sympy.Symbol]

    def operand(self, name: str) -> Any:
        """The argument called `name` in the schema, or its default; None if not given."""
        return ops.bind(self.node).get(name)

    def shape(self, name: str) -> Sizes:
        """The shape of a tensor argument; empty if it is not given."""
        operand = self.operand(name)
        return self.shape_of(operand) if isinstance(operand, Node) else ()

    def shape_of(self, node: Node) -> Sizes:
        """The shape of the value of a node."""
        return self._sizes(node.meta.get("val"))

    @property
    def output(self) -> Sizes:
        """The shape of the (first) result."""
        value = self.node.meta.get("val")
        return self._sizes(value[0] if isinstance(value, tuple | list) and value else value)

    @property
    def output_size(self) -> Expr:
        """Elements of the (first) result."""
        return product(self.output)

    def size(self, name: str) -> Expr:
        """Elements of a tensor argument; 0 if it is not given."""
        operand = self.operand(name)
        return product(self.shape_of(operand)) if isinstance(operand, Node) else ZERO

    def read_bytes(self) -> Expr:
        """Bytes of all activations among the operands, each once."""
        return self.bytes_of(node for node in self.node.all_input_nodes if node.op != "get_attr")

    def weight_bytes(self) -> Expr:
        """Bytes of all weights among the operands, each once."""
        return self.bytes_of(node for node in self.node.all_input_nodes if node.op == "get_attr")

    def written_bytes(self) -> Expr:
        """Bytes of all results."""
        return self.bytes_of([self.node])

    def bytes_per_element(self) -> int:
        """Of the (first) result."""
        value = self.node.meta.get("val")
        first = value[0] if isinstance(value, tuple | list) and value else value
        return first.element_size() if isinstance(first, Tensor) else 0

    def work(self, flops: Expr | int, contraction_flops: Expr | int = 0) -> Work:
        """Work that reads every operand once and writes the result once."""
        return Work(
            flops=sympy.sympify(flops) + contraction_flops,
            contraction_flops=sympy.sympify(contraction_flops),
            read_bytes=self.read_bytes(),
            written_bytes=self.written_bytes(),
            weight_bytes=self.weight_bytes(),
        )

    def bytes_of(self, nodes: Iterable[Node]) -> Expr:
        """Bytes of the values of some nodes."""
        values = [value for node in nodes for value in _tensors(node.meta.get("val"))]
        sizes = [product(self._sizes(value)) * value.element_size() for value in values]
        return sympy.Add(*sizes)

    def _sizes(self, value: Any) -> Sizes:
        if not isinstance(value, Tensor):
            return ()
        sizes = (sympy.sympify(size_of(size)) for size in value.shape)
        named: list[Any] = [size.xreplace(dict(self.names)) for size in sizes]
        return tuple(named)


def product(sizes: Sizes) -> Expr:
    """The number of elements of a shape."""
    result: Any = sympy.Mul(*sizes)
    return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [item for item in value if isinstance(item, Tensor)]
    return []
