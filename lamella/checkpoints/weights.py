"""The weights of a checkpoint by the names that transformers uses, each made when it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamella.checkpoints.folded import agrees, unfolded
from lamella.checkpoints.matching import Bound, Comparison, compare, evaluate, weights_of
from lamella.checkpoints.packed import Packed
from lamella.checkpoints.reference import Reference
from lamella.checkpoints.report import listed
from lamella.errors import CheckpointError
from lamella.ir.checkpoint_names import source_of
from lamella.ir.graph import Graph
from lamella.ir.model_folder import CONFIG, read_weight_map
from lamella.ir.ops import aten, lam
from lamella.ir.weights import WeightSource

_LISTED = 12


@dataclass(frozen=True)
class Weight:
    """A weight of the model that is written.

    Attributes:
        name: What transformers calls it.
        shape: As the checkpoint stores it.
        dtype: Likewise.
        read: Makes the tensor; nothing is kept.
        packed: The codes, for a weight that the graph holds in few bits and the model as
            ``[out, in]``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    packed: Packed | None = None


@dataclass(frozen=True)
class Weights:
    """All weights of the model that is written, and what there is to say about them."""

    weights: tuple[Weight, ...]
    remarks: tuple[str, ...] = ()


def weights_for(graph: Graph, reference: Reference) -> Weights:
    """What `graph` holds for every weight of the model.

    Raises:
        CheckpointError: The model computes something else than `graph` with whatever weights;
            every difference is listed.
    """
    comparison = compare(graph, reference.graph)
    _check(graph, reference, comparison)
    return _Collector(graph, reference, comparison).collect()


class _Collector:
    def __init__(self, graph: Graph, reference: Reference, comparison: Comparison) -> None:
        self.graph, self.reference, self.model = graph, reference, reference.graph
        self.bound: dict[str, list[Bound]] = {}
        for one in comparison.bound:
            for weight in weights_of(one.wanted):
                if not self.model.is_loaded(weight):
                    self.bound.setdefault(str(weight.target), []).append(one)
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.rounded = list(dict.fromkeys(comparison.rounded))
        self.problems: list[str] = []
        self.unread: list[str] = []

    def collect(self) -> Weights:
        found = tuple(self._weights())
        if self.problems:
            raise CheckpointError(f"the checkpoint can't be written: {_listed(self.problems)}")
        return Weights(found, tuple(self._remarks()))

    def _weights(self) -> Iterator[Weight]:
        for name, names, held in _distinct(self.reference.model):
            self.aliases[name] = names
            known = next((one for one in names if one in self.bound), None)
            if known is None:
                yield self._without_reader(name, held)
            else:
                yield self._of(name, known, held)

    def _of(self, name: str, known: str, held: Tensor) -> Weight:
        """The weight `name`, which the graph of the model reads as `known`."""
        bounds = self.bound[known]
        direct = [one for one in bounds if one.wanted.op == "get_attr"]
        expressed = [one for one in bounds if one.wanted.op != "get_attr"]
        if not direct:
            weight = self._expressed(name, expressed[0], held)
            self._compare(weight, known, expressed[1:])
            return weight
        values = dict.fromkeys(_name(one.found) for one in direct)
        if len(values) > 1:
            both = " and ".join(values)
            self.problems.append(f"{known} is one weight in the model, here there are {both}")
        # A head that shares the codes of an embedding multiplies them in single precision.
        weight = self._direct(name, known, min(direct, key=_is_lookup), held)
        self._compare(weight, known, expressed)
        return weight

    def _compare(self, weight: Weight, known: str, expressed: list[Bound]) -> None:
        """Other constants that were folded from `weight` must still follow from it."""
        for one in expressed:
            sources = [w for w in weights_of(one.wanted) if not self.model.is_loaded(w)]
            if one.found is None or len(sources) != 1:
                continue
            turned = known in self.model.origin.transposed
            value = weight.read().mT if turned else weight.read()
            got = evaluate(self.model, one.wanted, {sources[0]: value})
            if not agrees(got, self.graph.weight(one.found)):
                self.problems.append(f"{one.found.target} no longer follows from {known}")

    def _direct(self, name: str, known: str, one: Bound, held: Tensor) -> Weight:
        """A weight that the graph holds as it is, in few bits, or not at all."""
        shape, dtype = tuple(held.shape), held.dtype
        turned = known in self.model.origin.transposed
        packed: Packed | None = None
        if one.is_packed:
            rows, columns = one.wanted.meta["val"].shape
            packed = Packed(self.graph, one.reader, (int(rows), int(columns)))
        elif one.found is not None:
            dtype = one.found.meta["val"].dtype

        def read() -> Tensor:
            if packed is not None:
                value = packed.dequantized(dtype)
            elif one.found is not None:
                value = self.graph.weight(one.found)
            else:
                value = torch.full(shape, _without_effect(one), dtype=dtype)
            return value.mT if turned else value

        return Weight(name, shape, dtype, read, None if turned else packed)

    def _expressed(self, name: str, one: Bound, held: Tensor) -> Weight:
        """A weight of which the graph holds what was computed from it."""
        sources = [w for w in weights_of(one.wanted) if not self.model.is_loaded(w)]
        wanted = next(w for w in sources if str(w.target) in self.aliases[name])
        turned = str(wanted.target) in self.model.origin.transposed

        def read() -> Tensor:
            found = self._original(one, sources, wanted)
            value = self._unfolded(one) if found is None else found
            return value.mT if turned else value

        try:
            # Once to see that it can be done; the value is made again when it is written.
            read()
        except CheckpointError as error:
            self.problems.append(str(error))
        return Weight(name, tuple(held.shape), held.dtype, read)

    def _unfolded(self, one: Bound) -> Tensor:
        if one.found is not None:
            return unfolded(self.model, one.wanted, self.graph.weight(one.found))
        fake: Any = one.wanted.meta["val"]
        value = torch.full(fake.shape, _without_effect(one), dtype=fake.dtype)
        return unfolded(self.model, one.wanted, value)

    def _original(self, one: Bound, sources: list[Node], wanted: Node) -> Tensor | None:
        """The weight as the folder has it, if it still gives the constant."""
        if one.found is None or self.source is None:
            return None
        names = {node: self.reference.name_before(str(node.target)) for node in sources}
        if not set(names.values()) <= self.source.names():
            return None
        turned = self.model.origin.transposed
        values = {node: self.source.read(before) for node, before in names.items()}
        known = {n: v.mT if str(n.target) in turned else v for n, v in values.items()}
        got = evaluate(self.model, one.wanted, known)
        return known[wanted] if torch.equal(got, self.graph.weight(one.found)) else None

    def _without_reader(self, name: str, held: Tensor) -> Weight:
        """A weight that the graph doesn't read: what the folder has, or zeros."""
        shape, dtype = tuple(held.shape), held.dtype
        before, source = self.reference.name_before(name), self.source
        if source is not None and before in source.names():
            return Weight(name, shape, dtype, lambda: source.read(before).to(dtype))
        if dtype.is_floating_point:
            # Counters of training steps are no weights that anybody misses.
            self.unread.append(name)
        return Weight(name, shape, dtype, lambda: torch.zeros(shape, dtype=dtype))

    @cached_property
    def source(self) -> WeightSource | None:
        """The weights in the folder that the graph was captured from, if it is still there."""
        if self.graph.source is not None:
            return self.graph.source
        folder = self.graph.origin.folder
        if folder is None or not (Path(folder) / CONFIG).is_file():
            return None
        stored = read_weight_map(Path(folder))
        return source_of(Path(folder), self.reference.captured, stored)

    def _remarks(self) -> Iterator[str]:
        if self.unread:
            yield f"zeros for weights that nothing reads: {listed(self.unread)}"
        if self.rounded:
            tables = listed(self.rounded)
            yield f"readers compute tables more exactly than the graph has them: {tables}"


def _check(graph: Graph, reference: Reference, comparison: Comparison) -> None:
    """Refuse a graph that no weights of the model are.

    Raises:
        CheckpointError: There are differences.
    """
    if not comparison.differences:
        return
    whole = {f"{one.name}.{i}" for one in reference.lists for i in range(one.count)}
    parts = [name for name in graph.origin.dropped if name not in whole]
    reason = _listed(comparison.differences)
    if parts:
        reason = (
            f"{type(reference.model).__name__} has no layer without {', '.join(parts)}, which "
            f"were dropped; drop whole blocks (drop-blocks), or leave these in ({reason})"
        )
    raise CheckpointError(
        f"the edited graph is no {type(reference.model).__name__} with other weights: {reason}"
    )


def _distinct(model: Any) -> Iterator[tuple[str, tuple[str, ...], Tensor]]:
    """Each weight once: the name it is stored under, all its names, and the weight."""
    held: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, value in held.items():
        names.setdefault(id(value), []).append(name)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for group in names.values():
        stored = next((name for name in group if name not in tied), group[0])
        yield stored, tuple(group), held[stored]


def _is_lookup(one: Bound) -> bool:
    return one.reader.target in (aten.embedding.default, lam.embedding_nbits.default)


def _without_effect(one: Bound) -> float:
    """The value of an operand that may as well be left out: scale 1, bias 0."""
    return 1.0 if one.operand == "weight" else 0.0


def _name(node: Node | None) -> str:
    return "nothing" if node is None else str(node.target)


def _listed(reasons: list[str]) -> str:
    reasons = list(dict.fromkeys(reasons))
    more = len(reasons) - _LISTED
    return "; ".join(reasons[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
