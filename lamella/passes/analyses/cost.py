"""What a graph costs: operations and bytes as functions of batch and sequence."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import sympy
from torch.fx import Node

from lamella.ir.axes import merged_batch
from lamella.ir.graph import Graph
from lamella.ir.ops import op_name
from lamella.ir.symbols import symbol_names
from lamella.passes.analyses.caches import caches_of
from lamella.passes.analyses.lifetimes import Lifetimes, lifetimes_of
from lamella.passes.base import Analyses, Analysis
from lamella.rules.cost import COST
from lamella.rules.work import ZERO, Call, Expr, Work


@dataclass(frozen=True)
class OperationCost:
    """The cost of one operation.

    Attributes:
        node: Name of the node.
        operator: ``aten.linear.default``.
        block: Name of the block it is in, or "" outside of blocks.
        work: What it does.
        stored_bytes: Bytes of the weights of which it is the first reader.
    """

    node: str
    operator: str
    block: str
    work: Work
    stored_bytes: Expr


@dataclass(frozen=True)
class Figures:
    """A cost in numbers, or as expressions before sizes are given.

    Attributes:
        flops: Operations; a multiply-add is 2.
        contraction_flops: The part in matrix products, convolutions and attention.
        stored_bytes: Bytes of the weights, each once.
        weight_bytes: Bytes of weights read: a weight with two readers counts twice, an embedding
            only the rows it picks.
        read_bytes: Bytes of activations read.
        written_bytes: Bytes of activations written.
        cache_bytes: Bytes of keys and values of causal self-attention, and of recurrent states.
    """

    flops: Expr = ZERO
    contraction_flops: Expr = ZERO
    stored_bytes: Expr = ZERO
    weight_bytes: Expr = ZERO
    read_bytes: Expr = ZERO
    written_bytes: Expr = ZERO
    cache_bytes: Expr = ZERO

    @property
    def activation_bytes(self) -> Expr:
        """Bytes of activations read and written."""
        return self.read_bytes + self.written_bytes


_FIELDS = (
    "flops",
    "contraction_flops",
    "stored_bytes",
    "weight_bytes",
    "read_bytes",
    "written_bytes",
    "cache_bytes",
)


@dataclass(frozen=True)
class Numbers:
    """A cost at given sizes; fields as in `Figures`.

    Attributes:
        flops: Operations.
        contraction_flops: In matrix products, convolutions and attention.
        stored_bytes: Weights, each once.
        weight_bytes: Weights as often as they are read.
        read_bytes: Activations read.
        written_bytes: Activations written.
        cache_bytes: Keys, values and recurrent states.
    """

    flops: int
    contraction_flops: int
    stored_bytes: int
    weight_bytes: int
    read_bytes: int
    written_bytes: int
    cache_bytes: int

    @property
    def activation_bytes(self) -> int:
        """Activations read and written."""
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class CostAt:
    """A `CostReport` at given sizes.

    Attributes:
        sizes: Symbol -> size.
        total: Of the whole graph.
        per_block: Name of the block -> its cost.
        per_operation: Name of the node -> its cost.
        peak_activation_bytes: The most bytes of activations alive at one time when the nodes
            run in order and a value is freed after its last reader; weights and the buffers
            inside of kernels not counted.
    """

    sizes: Mapping[str, int]
    total: Numbers
    per_block: Mapping[str, Numbers]
    per_operation: Mapping[str, Numbers]
    peak_activation_bytes: int


@dataclass(frozen=True)
class CostReport:
    """The cost of a graph, with symbolic sizes.

    Attributes:
        operations: Every operation in order.
        blocks: Names of the blocks in order.
        symbols: Names of the sizes that the expressions are over.
        lifetimes: When each value is computed and read last.
    """

    operations: tuple[OperationCost, ...] = field(repr=False)
    blocks: tuple[str, ...] = field(repr=False)
    symbols: tuple[str, ...]
    lifetimes: Lifetimes = field(repr=False)

    @functools.cached_property
    def total(self) -> Figures:
        """The whole graph."""
        return _sum(self.operations)

    @functools.cached_property
    def per_block(self) -> Mapping[str, Figures]:
        """Name of the block -> the cost of what only this block needs."""
        inside: dict[str, list[OperationCost]] = {name: [] for name in self.blocks}
        for operation in self.operations:
            if operation.block:
                inside[operation.block].append(operation)
        return {name: _sum(operations) for name, operations in inside.items()}

    @functools.cached_property
    def per_operation(self) -> Mapping[str, Figures]:
        """Name of the node -> its cost."""
        return {operation.node: _sum([operation]) for operation in self.operations}

    def at(self, **sizes: int) -> CostAt:
        """The numbers at some sizes: ``report.at(batch=1, sequence=128)``.

        A size that is not given takes that of its plain name: ``sequence_2`` and
        ``decoder_sequence`` that of ``sequence``.

        Raises:
            ValueError: A size is unknown, missing, or smaller than 1.
        """
        values = self._sizes(sizes)
        evaluate = _Evaluation(values)
        return CostAt(
            sizes={str(symbol): size for symbol, size in values.items()},
            total=evaluate.figures(self.total),
            per_block={name: evaluate.figures(one) for name, one in self.per_block.items()},
            per_operation={n: evaluate.figures(one) for n, one in self.per_operation.items()},
            peak_activation_bytes=self.lifetimes.peak_bytes(evaluate.number),
        )

    def _sizes(self, given: Mapping[str, int]) -> dict[sympy.Symbol, int]:
        known = {*self.symbols, *map(_base, self.symbols)}
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(
                f"unknown size {', '.join(unknown)}: the model has "
                f"{', '.join(self.symbols) or 'fixed sizes only'}"
            )
        found = {name: given.get(name, given.get(_base(name), 0)) for name in self.symbols}
        missing = [name for name, size in found.items() if size < 1]
        if missing:
            raise ValueError(f"give a size of at least 1 for {', '.join(missing)}")
        return {_symbol(name): size for name, size in found.items()}


@dataclass(frozen=True)
class Cost(Analysis[CostReport]):
    """Operations and bytes of a graph: total, per block and per operation.

    The first axes of all inputs are one ``batch`` unless the samples of the capture had
    different sizes there; other axes keep the names of `symbol_names`. Weights count once where
    they are stored (in the block of the first reader) and as often as they are read in traffic.
    The cache is ``2 * heads * head_dim * bytes`` for keys and values, per token, of every causal
    self-attention (its mask hides the future), and the state of scans; encoders and
    cross-attention have none.
    """

    name: ClassVar[str] = "cost"

    def run(self, graph: Graph, analyses: Analyses) -> CostReport:
        """Ask the cost rule of every operation.

        Raises:
            MissingRuleError: Some operators have no rule.
        """
        return cost_of(graph)


def cost_of(graph: Graph) -> CostReport:
    """The report of `Cost`, without a pass around it.

    Raises:
        MissingRuleError: Some operators have no rule.
    """
    COST.check(graph)
    names = readable_symbols(graph)
    block_of = {node: block.name for block in graph.blocks for node in block.nodes}
    caches = caches_of(graph, names)
    stored: set[Node] = set()
    operations: list[OperationCost] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        call = Call(node, names)
        rule = COST[cast(Any, node.target)]
        first = [n for n in node.all_input_nodes if n.op == "get_attr" and n not in stored]
        stored.update(first)
        operations.append(
            OperationCost(
                node.name,
                op_name(node.target),
                block_of.get(node, ""),
                _with_cache(rule(call), caches.get(node)),
                call.bytes_of(first),
            )
        )
    return CostReport(
        tuple(operations),
        tuple(block.name for block in graph.blocks),
        tuple(dict.fromkeys(str(symbol) for symbol in names.values())),
        lifetimes_of(graph, names),
    )


def readable_symbols(graph: Graph) -> dict[sympy.Symbol, sympy.Symbol]:
    """Symbol of the trace -> symbol with a readable name, the batches of all inputs merged."""
    merged = merged_batch(graph)
    names = symbol_names(graph.nodes)
    return {symbol: _symbol(names[merged.get(symbol, symbol)]) for symbol in names}


def _with_cache(work: Work, cache_bytes: Expr | None) -> Work:
    return work if cache_bytes is None else dataclasses.replace(work, cache_bytes=cache_bytes)


def _sum(operations: Iterable[OperationCost]) -> Figures:
    operations = list(operations)
    sums = {
        name: sympy.Add(*(getattr(operation.work, name) for operation in operations))
        for name in _FIELDS
        if name != "stored_bytes"
    }
    stored = sympy.Add(*(operation.stored_bytes for operation in operations))
    return Figures(**sums, stored_bytes=stored)


class _Evaluation:
    """Expressions at fixed sizes; equal expressions are evaluated once."""

    def __init__(self, sizes: Mapping[sympy.Symbol, int]) -> None:
        self._sizes = dict(sizes)
        self._known: dict[Expr, int] = {}

    def number(self, expression: Expr) -> int:
        if expression not in self._known:
            value: Any = expression.subs([*self._sizes.items()])
            self._known[expression] = int(value)
        return self._known[expression]

    def figures(self, figures: Figures) -> Numbers:
        return Numbers(**{name: self.number(getattr(figures, name)) for name in _FIELDS})


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


def _base(name: str) -> str:
    return re.sub(r"_\d+$", "", name.removeprefix("decoder_"))
