"""From the graph of a model and a preset to the graph that computes relevance.

The result is an ordinary graph: the inputs of the model (and a seed) in, the outputs of the
model, the relevance of the inputs and what else was asked for out. It holds no autograd; it runs,
is compiled and is exported like any other. Nodes of the sweep stand in the order in which the
coefficients are computed, so that a runner frees each after its last reader.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.errors import GraphError, closest
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.runner import token_mask
from lamella.passes.relevance.checkpoint import Checkpoints
from lamella.passes.relevance.folding import fold_batch_norms
from lamella.passes.relevance.ledger import Line, amount, lines_of, widened
from lamella.passes.relevance.relevance_graph import DEFAULT_SCALE, SCALE, RelevanceGraph
from lamella.passes.relevance.request import Request, Tap
from lamella.passes.relevance.sweep import Step, Sweep, carrying_nodes, places_of
from lamella.passes.relevance.traced import Recorder, Recording, Shapes, Traced
from lamella.passes.relevance.winners import keep_winners
from lamella.rewrite.incremental.once import flat_signature
from lamella.rules.relevance.presets import Preset
from lamella.rules.relevance.roles import roles_of, sources_of
from lamella.rules.relevance.view import zeros_for

SEED = "seed"
"""Name of the input for the coefficient of the output."""

LABEL = "label"
"""Name of the input for the class of each row, ``[batch]``, integers."""


def emit(
    graph: Graph, preset: Preset, request: Request | None = None, *, shapes: Shapes | None = None
) -> RelevanceGraph:
    """The graph that computes the relevance that `request` asks for; `graph` is left as it is.

    Args:
        graph: A canonical graph of a model.
        preset: The rules.
        request: What to compute; by default the relevance of the inputs for a seed given later.
        shapes: A dict that emissions for one model may share: sizes are worked out once.

    Raises:
        MissingRuleError: Some operators on the way have no rule; all are listed.
        GraphError: The request names an output or a node that the graph does not have, or
            nothing that is explained depends on an input that relevance can be asked for.
    """
    emission = _Emission(graph, preset, request or Request(), shapes)
    with emission.graph.author("relevance"), Recording(emission.recorder):
        emission.sweep_all()
        return emission.finished()


class _Emission:
    """A relevance graph under construction."""

    def __init__(
        self, graph: Graph, preset: Preset, request: Request, shapes: Shapes | None
    ) -> None:
        self.preset, self.request = preset, request
        self.graph = graph.copy()
        self.replaced = fold_batch_norms(self.graph) if preset.fold_batch_norms else {}
        self.replaced |= keep_winners(self.graph)
        self.nodes = self.graph.nodes
        self.by_name = {node.name: node for node in self.nodes if node.op != "output"}
        self.sources = sources_of(self.graph)
        more = [self.by_name[name] for name in self.request.sources]
        self.roles = roles_of(self.graph, [*self.sources.values(), *more])
        self.recorder = Recorder(self.graph, {} if shapes is None else shapes)
        self.target = self._explained()
        self.mask = token_mask(self.graph, self.target)
        self.lines: list[Line] = []
        self.tapped: dict[str, Node] = {}
        self.sweep = self._prepared()
        self.due = self._taps_by_node()
        self.scale = self._scale()

    def sweep_all(self) -> None:
        """Compute the coefficients of everything that is wanted."""
        if self.target not in self.sweep.carrying:
            raise GraphError(
                f"output {self._output_name()!r} does not depend on a value whose relevance is "
                f"wanted; relevance starts from floating-point inputs and embeddings of integers"
            )
        self.seed = self._seed()
        if self.request.ledger or self.request.taps:
            # Where it stands depends on nothing that comes later: the output can be freed.
            self.start = amount(self.recorder.value(self.target), self.seed).node
        start = self._narrowed(self.seed)
        self.sweep.run(self.target, start, [n for n in self.nodes if n.op != "output"])

    def finished(self) -> RelevanceGraph:
        """The graph with its outputs and their names."""
        outputs = dict(zip(self.graph.signature.outputs, self.graph.outputs, strict=True))
        results: dict[str, Node] = {}
        if self.request.inputs:
            for name, node in self.sources.items():
                results[f"relevance.{name}"] = self._relevance(node).node
        results |= {f"tap.{tap.name}": self.tapped[tap.name] for tap in self.request.taps}
        if self.request.ledger or self.request.taps:
            results["start"] = self.start
        if self.request.ledger:
            results |= self._ledger()
        outputs |= results
        inputs = self.graph.signature.inputs
        names = inputs if self.request.seed is not None else (*inputs, SEED)
        names = (*names, LABEL) if self.request.seed is not None and self.request.label else names
        self.graph.set_outputs(outputs.values(), flat_signature(names, tuple(outputs)))
        reached = tuple(node.name for node in self.sweep.coefficients)
        self.graph.finish()
        return RelevanceGraph(
            self.graph,
            {name: node.name for name, node in self.sources.items()},
            tuple(line.entry for line in self.lines),
            reached,
            self.replaced,
            frozenset(results),
            is_scaled=self.scale is not None,
        )

    # ---- the beginning ------------------------------------------------------------------

    def _explained(self) -> Node:
        """The node of the output that is explained."""
        names, wanted = self.graph.signature.outputs, self.request.output
        if isinstance(wanted, str) and wanted not in names:
            raise GraphError(
                f"the model has no output {wanted!r}{closest(wanted, names)}; it has "
                f"{', '.join(names)}"
            )
        place = names.index(wanted) if isinstance(wanted, str) else wanted
        if not -len(names) <= place < len(names):
            raise GraphError(f"the model has {len(names)} outputs, there is no output {place}")
        node = self.graph.outputs[place]
        if not isinstance(node, Node) or not node.meta["val"].is_floating_point():
            raise GraphError(f"output {names[place]!r} holds no floating-point numbers to explain")
        return node

    def _output_name(self) -> str:
        return self.graph.signature.outputs[self.graph.outputs.index(self.target)]

    def _seed(self) -> Any:
        output = self._wide(self.recorder.value(self.target))
        if self.request.seed is None:
            return self._wide(self._new_input(SEED, self.target.meta["val"]))
        if not self.request.label:
            return self._on_tokens(self.request.seed(output))
        value = self.target.meta["val"]
        with self.graph.fake_mode():
            fake = torch.empty((value.shape[0],), dtype=torch.int64, device=value.device)
        return self._on_tokens(self.request.seed(output, self._new_input(LABEL, fake)))

    def _new_input(self, name: str, fake: Tensor) -> Traced:
        if name in self.graph.signature.inputs:
            raise GraphError(f"the model has an input {name!r} itself, which would be taken twice")
        return self.recorder.value(self.graph.add_input(name, fake))

    def _on_tokens(self, seed: Any) -> Any:
        """`seed` without the tokens that an attention mask hides."""
        if self.mask is None or seed.ndim < 3:
            return seed
        shown = self.recorder.value(self.mask) != 0
        shape = [*shown.shape, *[1] * (seed.ndim - 2)]
        return aten.where.ScalarOther(aten.reshape.default(shown, shape), seed, 0.0)

    def _prepared(self) -> Sweep:
        ends = frozenset(self.sources.values())
        wanted = set(ends) if self.request.inputs or self.request.ledger else set[Node]()
        wanted |= {self._node(name) for tap in self.request.taps for name in tap.nodes}
        carrying = carrying_nodes(self.graph, self.roles, wanted, ends)
        places = places_of(self.graph, self.roles)
        found = Sweep(self.recorder, self.preset, self.roles, ends, carrying, places)
        if self.request.checkpoint:
            found.enter = Checkpoints.of_blocks(self.recorder).enter
        if self.request.ledger:
            found.stepped = self._book
        found.passed = self._write_taps
        return found

    # ---- numbers of 16 bits -------------------------------------------------------------

    def _scale(self) -> Any:
        """The factor of coefficients in float16, which lose small numbers; else None."""
        if self.target.meta["val"].dtype != torch.float16:
            return None
        return self.recorder.value(self.graph.add_weight(SCALE, torch.tensor(DEFAULT_SCALE)))

    def _wide(self, value: Any) -> Any:
        """`value` in float32 where it has 16 bits."""
        return aten.to.dtype(value, torch.float32) if value.dtype in _NARROW else value

    def _narrowed(self, seed: Any) -> Any:
        """The seed as the coefficient of the output."""
        dtype = self.target.meta["val"].dtype
        scaled = seed if self.scale is None else seed * self.scale
        return aten.to.dtype(scaled, dtype) if dtype in _NARROW else seed

    def _unscaled(self, value: Any) -> Any:
        """A coefficient, or what is linear in it, in the units of the seed."""
        wide = self._wide(value)
        return wide if self.scale is None else wide / self.scale

    # ---- on the way ---------------------------------------------------------------------

    def _book(self, step: Step) -> None:
        self.lines += lines_of(step, self.recorder, self.roles)

    def _taps_by_node(self) -> dict[Node, list[Tap]]:
        """What can be computed when the sweep has passed a node: the first of those it reads."""
        place = {node: index for index, node in enumerate(self.nodes)}
        found: dict[Node, list[Tap]] = {}
        for tap in self.request.taps:
            first = min(map(self._node, tap.nodes), key=place.__getitem__)
            found.setdefault(first, []).append(tap)
        return found

    def _write_taps(self, node: Node) -> None:
        for tap in self.due.get(node, ()):
            self.tapped[tap.name] = self._tap(tap).node

    # ---- the end ------------------------------------------------------------------------

    def _node(self, name: str) -> Node:
        name = self.replaced.get(name, name)
        if name not in self.by_name:
            raise GraphError(f"the graph has no node called {name!r}{closest(name, self.by_name)}")
        return self.by_name[name]

    def _coefficient(self, node: Node) -> Any:
        found = self.sweep.coefficients.get(node)
        return zeros_for(self.recorder.value(node)) if found is None else found

    def _relevance(self, node: Node) -> Any:
        """The relevance of a source, whether its layer gave it a coefficient or relevance."""
        terminal = self.sweep.terminal.get(node)
        if terminal is not None and node not in self.sweep.coefficients:
            return self._unscaled(terminal)
        found = self._wide(self.recorder.value(node)) * self._unscaled(self._coefficient(node))
        return found if terminal is None else found + self._unscaled(terminal)

    def _tap(self, tap: Tap) -> Any:
        nodes = [self._node(name) for name in tap.nodes]
        for node in nodes:
            if not isinstance(node.meta["val"], Tensor):
                raise GraphError(f"tap {tap.name!r} reads {node.name}, which is not one tensor")
        pairs = [
            (self.recorder.value(node), self._unscaled(self._coefficient(node))) for node in nodes
        ]
        return tap.function(*pairs)

    def _ledger(self) -> dict[str, Node]:
        sums = [aten.sum.default(widened(self._relevance(n))) for n in self.sources.values()]
        leaks = aten.stack.default([line.amount for line in self.lines])
        return {
            "ledger.inputs": aten.stack.default(sums).node,
            "ledger.leaks": (leaks if self.scale is None else leaks / self.scale).node,
        }


_NARROW = frozenset({torch.float16, torch.bfloat16})

__all__ = ["LABEL", "SEED", "RelevanceGraph", "emit"]
