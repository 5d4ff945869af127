"""A graph that continues from a cache, made from one that reads whole sequences.

The graph of a decoder computes row `t` of everything from the tokens up to `t`. Where operations
meet rows of other tokens (attention, a causal convolution, a recurrence) the rows of the past are
all that is missing: they come in as the cache. What depends on positions alone is computed for
the positions of the new tokens. What depends on no token of the sequence that grows (an encoder)
moves to a graph of its own that runs once.

So the cache is right by construction, whatever passes did to the graph before: a layer that was
dropped has no slot, and the numbering has no gap.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from lamella.errors import IncrementalError
from lamella.ir import ops
from lamella.ir.cache import CacheLayout, Positions, Slot
from lamella.ir.graph import Graph
from lamella.ir.symbols import shape_of, size_of
from lamella.ir.torch_private import symbolic_size
from lamella.rewrite.incremental.attention import (
    Site,
    hides_future,
    meaning_of,
    sites_of,
)
from lamella.rewrite.incremental.evaluate import Evaluation
from lamella.rewrite.incremental.lengths import Lengths
from lamella.rewrite.incremental.limits import positions_limit
from lamella.rewrite.incremental.roles import (
    Role,
    is_mask,
    is_size,
    roles_of,
    tokens_of,
)
from lamella.rewrite.incremental.rows import Rows, is_whole

_log = logging.getLogger(__name__)
aten = torch.ops.aten
lam = torch.ops.lamella
_PAST_EXAMPLE = 11
"""A length of the past that no other size of a model is likely to have."""


class Builder:
    """Turns a copy of a graph into one that continues from a cache, in place.

    Attributes:
        graph: What is edited.
        tokens: Its input of tokens.
        mask: Its input of the mask.
        slots: The slots so far, each with the nodes of its input and output.
    """

    def __init__(self, graph: Graph) -> None:
        """Start from a copy of a canonical graph, which is edited from here on."""
        self.graph = graph
        self.tokens = tokens_of(graph)
        self.length: sympy.Symbol = shape_of(self.tokens)[1]  # pyright: ignore[reportAttributeAccessIssue]  (`tokens_of` made sure)
        self.roles: dict[Node, Role] = roles_of(graph, self.tokens)
        self.sites = [site for site in sites_of(graph) if self._grows(site)]
        self.past = symbolic_size(graph.fake_mode(), "past", _PAST_EXAMPLE)
        self.mask = self._mask_input()
        self.slots: list[tuple[Slot, Node, Node | None]] = []
        self._written: dict[Node, tuple[Any, Any]] = {}
        self._fresh: dict[Node, Node] = {}
        self.once_names: dict[Node, str] = {}
        self._position_input: Node | None = None
        self.positions_from: Positions = "index"
        self.lengths: Lengths
        self.rows: Rows
        self.evaluation: Evaluation

    def remember(self, node: Node, role: Role) -> None:
        """The role of a node that was added."""
        self.roles[node] = role

    def new_slot(self, layer: int, kind: str, shape: Sequence[Any], dtype: torch.dtype) -> Node:
        """The input of a slot; its output is set later.

        Args:
            layer: Number of the layer.
            kind: See `Slot.kind`.
            shape: All sizes, the batch first; `past` where it grows.
            dtype: Of the entries.
        """
        with self.graph.fake_mode():
            value = torch.empty(list(shape), dtype=dtype)
        name = f"past_key_values.{layer}.{kind}"
        node = self.graph.add_input(name.replace(".", "_"), value)
        sizes = tuple(-1 if size is self.past else int(size) for size in shape[1:])
        label = str(dtype).removeprefix("torch.")
        slot = Slot(layer, kind, name, f"present.{layer}.{kind}", sizes, label)  # pyright: ignore[reportArgumentType]
        self.slots.append((slot, node, None))
        return node

    def set_output(self, past: Node, present: Node) -> None:
        """Name what the slot with the input `past` holds afterwards."""
        self.slots = [(s, i, present if i is past else o) for s, i, o in self.slots]

    def measure(self) -> None:
        """Add the lengths, once all inputs are there; values of the sequence become whole."""
        self.lengths = Lengths(self.graph, self.tokens, self.mask)
        for node in self.graph.nodes:
            if self.roles.get(node) is Role.LENGTH:
                self._written[node] = (node.args, dict(node.kwargs))
                self.lengths.use_total(node)
        for node in self.graph.nodes:
            if is_size(node) and self._reads_sequence(node):
                self.lengths.use_new(node)
        self.graph.refresh([n for n in self.graph.nodes if self.roles.get(n) is Role.LENGTH])
        total = size_of(self.mask.meta["val"].shape[1])
        lengths = self.lengths
        self.rows = Rows(
            self.graph,
            is_whole(total),
            lengths.new,
            lengths.past,
            lengths.total,
            self._positions_of,
        )
        self.evaluation = Evaluation(self.graph, self.tokens, self.mask)

    def meet(self) -> None:
        """Give every operation on new tokens the rows of theirs of what is whole."""
        attentions = {site.node for site in self.sites}
        for node in self.graph.nodes:
            if self.roles.get(node) is not Role.NEW or node in attentions:
                continue
            for source in node.all_input_nodes:
                if self.roles.get(source) is Role.LENGTH:
                    self.graph.reread(node, source, self._aligned(node, source))

    def layout(self, once: tuple[str, ...]) -> CacheLayout:
        """The layout of the finished graph."""
        graph, given = self.graph, self._position_input
        taken = given if given in graph.inputs else None
        limit = None if taken is None else positions_limit(graph, taken, self.evaluation)
        return CacheLayout(
            tokens=str(self.tokens.target),
            mask=str(self.mask.target),
            positions=None if taken is None else str(taken.target),
            positions_from=self.positions_from,
            logits=graph.signature.outputs[0],
            once=once,
            slots=tuple(slot for slot, _, _ in self.slots),
            positions_limit=limit,
        )

    def add_positions(self) -> None:
        """Add the input of positions; it goes again when nothing reads it."""
        batch, new = self.tokens.meta["val"].shape
        prefix = "decoder_" if str(self.tokens.target).startswith("decoder_") else ""
        with self.graph.fake_mode():
            value = torch.empty((batch, new), dtype=torch.int64)
        taken = {str(node.target) for node in self.graph.inputs}
        if f"{prefix}position_ids" not in taken:
            self._position_input = self.graph.add_input(f"{prefix}position_ids", value)

    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs that are there, in order."""
        dotted = {node: slot.input for slot, node, _ in self.slots} | self.once_names
        return tuple(dotted.get(node, str(node.target)) for node in self.graph.inputs)

    def is_fixed_input(self, node: Node) -> bool:
        """Whether an input stays even when nothing reads it."""
        return node in (self.tokens, self.mask)

    def _grows(self, site: Site) -> bool:
        return self.roles.get(site.key) is Role.NEW and self.roles.get(site.node) is Role.NEW

    def _mask_input(self) -> Node:
        """The input of the mask, past and new; added when the model has none."""
        batch, new = self.tokens.meta["val"].shape
        found = [node for node in self.graph.inputs if is_mask(node, self.length)]
        dtype = found[0].meta["val"].dtype if found else torch.int64
        with self.graph.fake_mode():
            rows = found[0].meta["val"].shape[0] if found else batch
            value = torch.empty((rows, new + self.past), dtype=dtype)
        if found:
            self.graph.set_value(found[0], value)
            return found[0]
        prefix = "decoder_" if str(self.tokens.target).startswith("decoder_") else ""
        return self.graph.add_input(f"{prefix}attention_mask", value)

    def _reads_sequence(self, node: Node) -> bool:
        """Whether an integer measures a value of the whole sequence."""
        return any(self.roles.get(source) is Role.LENGTH for source in node.all_input_nodes)

    def _aligned(self, node: Node, source: Node) -> Node:
        """`source` cut on the axes where it meets the rows of `node`."""
        facts = ops.facts(node.target)
        category = "" if facts is None else facts.category
        if category == "attention":
            return self.rows.of(source, len(shape_of(source)) - 2)
        if category != "elementwise" or self._is_flat(source):
            return self._for_new(source, node)
        rank, cut = len(shape_of(node)), source
        for axis, size in enumerate(shape_of(source)):
            aligned = shape_of(node)[axis + rank - len(shape_of(source))]
            if self.rows.whole(size) and aligned == self.length:
                cut = self.rows.of(cut, axis, counted=True)
        return cut

    def _is_flat(self, node: Node) -> bool:
        """Whether the rows of a value are those of all samples in one axis."""
        sizes = [s for s in shape_of(node) if not isinstance(s, int)]
        return any(s.has(self.length) and not self.rows.whole(s) for s in sizes)

    def _for_new(self, source: Node, reader: Node) -> Node:
        """A buffer, or a count of rows, made as long as the new tokens are.

        Raises:
            IncrementalError: It is more than that.
        """
        if self.roles.get(source) is not Role.LENGTH:
            return source
        if source not in self._written or source.op == "placeholder":
            raise IncrementalError(
                f"{reader.name} ({ops.op_name(reader.target)}) mixes new tokens with "
                f"{source.name}, which depends on all positions; there is no rule for that"
            )
        if source not in self._fresh:

            def renewed(value: Node) -> Node:
                return self._for_new(value, reader)

            args, kwargs = map_arg(self._written[source], renewed)
            assert callable(source.target)
            self._fresh[source] = self.graph.call(source.target, *args, after=source, **kwargs)
        return self._fresh[source]

    def _positions_of(self, node: Node) -> Node | None:
        """The input of positions, where `node` counts the tokens: 0, 1, 2, …."""
        given, value = self._position_input, node.meta["val"]
        if given is None or not isinstance(value, Tensor) or value.dtype != torch.int64:
            return None
        if value.ndim != 2 or not self.rows.whole(size_of(value.shape[1])):
            return None
        ones = torch.ones(2, 7, dtype=torch.int64)
        counted = self.evaluation.at(node, 3, 4, ones)
        if not bool((counted == torch.arange(7)).all()):
            return None
        ones[1, :2] = 0
        padded = self.evaluation.at(node, 3, 4, ones)
        by_mask = ones.cumsum(1) * ones - 1
        if bool((padded == by_mask).all()):
            self.positions_from = "mask"
        elif not bool((padded == counted).all()):
            return None
        return given


@dataclass(frozen=True)
class Attended:
    """What a mask comes to: words for the operator, or rows to add to the scores.

    Attributes:
        bias: Rows to add to the scores.
        window: How many keys a query sees at most; 0 means all.
        masked: Whether the mask of the tokens hides keys.
    """

    bias: Node | None = None
    window: int = 0
    masked: bool = True


def attended(builder: Builder, site: Site) -> Attended:
    """What the mask of an attention comes to.

    Raises:
        IncrementalError: It lets a token see later ones.
    """
    if site.mask is None:
        if not site.is_causal:
            raise IncrementalError(
                f"{site.node.name} lets every token see the later ones; only a model whose "
                f"tokens see the earlier ones alone can continue from a cache"
            )
        return Attended()
    if builder.roles[site.mask] is Role.NEW:
        raise IncrementalError(f"the mask of {site.node.name} depends on the tokens themselves")
    rows = builder.rows.of(site.mask, len(shape_of(site.mask)) - 2)
    meaning = meaning_of(rows, builder.evaluation)
    if meaning is not None:
        return Attended(window=meaning.window, masked=meaning.padding)
    if not site.is_causal and not hides_future(rows, builder.evaluation):
        raise IncrementalError(
            f"the mask of {site.node.name} lets a token see later ones; such a model can't "
            f"continue from a cache"
        )
    return Attended(_added(builder, rows))


def _added(builder: Builder, rows: Node) -> Node:
    """What hides keys as what is added to scores."""
    if rows.meta["val"].dtype != torch.bool:
        return rows
    lowest = torch.finfo(torch.float32).min
    return builder.graph.call(aten.where.ScalarSelf, rows, 0.0, lowest, after=rows)
