"""Readable names for symbolic sizes: ``batch``, ``sequence``, ``batch_2``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

_AXES = {
    1: ("batch",),
    2: ("batch", "sequence"),
    3: ("batch", "sequence", "features"),
    4: ("batch", "channels", "height", "width"),
    5: ("batch", "channels", "frames", "height", "width"),
}
_CACHE = ("batch", "heads", "past", "width")


def size_of(size: Any) -> sympy.Expr | int:
    """A size as a number, or as an expression of the symbols of the graph."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression


def shape_of(node: Node) -> tuple[sympy.Expr | int, ...]:
    """The shape of the tensor that `node` computes; empty for what is not a tensor."""
    value = node.meta.get("val")
    return tuple(size_of(size) for size in value.shape) if isinstance(value, Tensor) else ()


def symbol_names(nodes: Sequence[Node]) -> dict[sympy.Symbol, str]:
    """A distinct readable name for every symbol in the shapes of the nodes of a graph.

    A symbol is called by the first axis of an input that it is the size of: the first axis is
    ``batch``, the second of two or three ``sequence``. A second symbol of that name gets a
    number, an axis of a ``decoder_…`` input the prefix. Symbols that are no size of an input
    (they depend on data) keep the name that PyTorch gave them.
    """
    names: dict[sympy.Symbol, str] = {}
    taken: set[str] = set()
    for node in (node for node in nodes if node.op == "placeholder"):
        shape = shape_of(node)
        axes = _CACHE if node.name.startswith("past_key_values") else _AXES.get(len(shape), ())
        for axis, size in enumerate(shape):
            if isinstance(size, sympy.Symbol) and size not in names:
                wanted = axes[axis] if axis < len(axes) else f"axis_{axis}"
                prefix = "decoder_" if axis > 0 and node.name.startswith("decoder_") else ""
                names[size] = _distinct(prefix + wanted, taken)
    for symbol in sorted(_symbols(nodes) - names.keys(), key=str):
        names[symbol] = _distinct(str(symbol), taken)
    return names


def named(size: sympy.Expr | int, names: Mapping[sympy.Symbol, str]) -> str:
    """`size` as text, with the symbols called as in `names`."""
    if isinstance(size, int):
        return str(size)
    symbols = {symbol: sympy.Symbol(names.get(symbol, str(symbol))) for symbol in _free(size)}
    return str(size.xreplace(symbols))


def _distinct(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def _symbols(nodes: Sequence[Node]) -> set[sympy.Symbol]:
    """The symbols of all shapes and integers."""
    found: set[sympy.Symbol] = set()
    seen: set[int] = set()
    for node in nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        for size in sizes:
            # Many shapes share the symbolic size itself: asking it for its symbols takes time.
            if isinstance(size, torch.SymInt) and id(size.node) not in seen:
                seen.add(id(size.node))
                expression = size_of(size)
                found |= set() if isinstance(expression, int) else _free(expression)
    return found


def _free(expression: sympy.Expr) -> set[sympy.Symbol]:
    free: Any = expression.free_symbols
    return set(free)
