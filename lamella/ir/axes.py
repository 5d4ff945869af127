"""Which symbolic sizes of the inputs mean the same.

A trace often gives two inputs a batch size each (``input_ids [s0, s1]``, ``attention_mask
[s2, s1]``) because nothing in the model forces them to agree. A person means one batch. The
first axes of all inputs are therefore taken to be the same size unless there is a static reason
against it: they had different sizes in the sample inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from lamella.ir.graph import Graph
from lamella.ir.symbols import size_of


def merged_batch(graph: Graph) -> Mapping[sympy.Symbol, sympy.Symbol]:
    """Each symbol on the first axis of an input -> the first such symbol of that sample size."""
    first: dict[int | None, sympy.Symbol] = {}
    merged: dict[sympy.Symbol, sympy.Symbol] = {}
    for node in graph.inputs:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        symbol = size_of(value.shape[0])
        if isinstance(symbol, sympy.Symbol):
            merged.setdefault(symbol, first.setdefault(_sample_size(value.shape[0]), symbol))
    return merged


def sizes_with(node: Node, merged: Mapping[sympy.Symbol, sympy.Symbol]) -> tuple[sympy.Expr, ...]:
    """The shape of a node after the symbols in `merged` are replaced."""
    value = node.meta.get("val")
    return sizes_of(value, merged) if isinstance(value, Tensor) else ()


def sizes_of(value: Tensor, merged: Mapping[sympy.Symbol, sympy.Symbol]) -> tuple[sympy.Expr, ...]:
    """The same for the shape of a value."""
    replaced: list[Any] = [sympy.sympify(size_of(s)).xreplace(dict(merged)) for s in value.shape]
    return tuple(replaced)


def _sample_size(size: Any) -> int | None:
    """What the size was when the model was traced, or None when that is not known."""
    return size.node.hint if isinstance(size, torch.SymInt) and size.node.has_hint() else None
