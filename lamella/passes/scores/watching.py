"""Effects of parts while sweeps run: what a part adds, times the coefficient that it gets.

Blocks, branches, heads, experts and channels differ only in how the entries of a value belong to
them; here each becomes rows of tokens, parts and entries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.fx import Node

from lamella.data import Samples
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.runner import token_mask
from lamella.ir.stream import Block, Sublayer
from lamella.passes.parts import Parts
from lamella.passes.relevance.request import relevance_of
from lamella.passes.scores.starts import Draws, all_seeds
from lamella.passes.scores.sweeps import Sweeps
from lamella.passes.scores.target import loss_target
from lamella.rules.relevance.presets import Preset

Baseline = Literal["zero", "mean"]
"""What takes the place of a part: nothing, or its mean over all tokens of the samples."""


def check_baseline(baseline: str) -> None:
    """Complain about a baseline that there is not.

    Raises:
        ValueError: It is neither.
    """
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline must be zero or mean, got {baseline!r}")


class Watched:
    """The parts of one value, over all sequences and sweeps.

    Attributes:
        coefficient: Name of the node whose coefficient is that of the parts.
        names: Of the parts, in order.
    """

    def __init__(  # noqa: PLR0913  (what a value is, and how it is cut)
        self,
        coefficient: str,
        values: tuple[str, ...],
        names: Sequence[str],
        *,
        mask: str | None,
        baseline: Baseline,
        axis: int = -1,
        cut: Parts | None = None,
    ) -> None:
        """Find out what to read.

        Args:
            coefficient: Name of the node whose coefficient counts.
            values: What the parts add: one value, or one minus another.
            names: Of the parts.
            mask: Name of the attention mask of the tokens, or None.
            baseline: What is expected in the place of a part.
            axis: Where channels lie.
            cut: The parts of a value; None where there is one part.
        """
        self.coefficient, self.names = coefficient, tuple(names)
        self._values, self._mask, self._axis, self._cut = values, mask, axis, cut
        self._baseline = baseline
        self._shown: Tensor | None = None
        self._owner: Tensor | None = None
        self._added = torch.zeros(())
        self._total: Tensor | None = None
        self._tokens: Tensor | None = None
        self._effects: list[Tensor] = []
        self._sums: list[Tensor] = []

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the nodes whose values are looked at."""
        experts = None if self._cut is None else self._cut.experts
        more = [] if self._mask is None else [self._mask]
        if experts is not None:
            more.append(experts.offsets.name)
            more += [] if experts.tokens is None else [experts.tokens.name]
        return (*self._values, *more)

    def look(self, sweeps: Sweeps) -> None:
        """What the parts add to the output of one sequence."""
        values = [self._rows(sweeps.value(name)) for name in self._values]
        self._see_rows(sweeps, len(values[0]))
        alone = len(values) == 1
        self._added = values[0] if alone else values[0].double() - values[1].double()
        total = self._by_part(self._added)
        tokens = self._by_part(torch.ones(len(self._added), 1, 1, dtype=torch.float64))
        self._total = total if self._total is None else self._total + total
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def begin(self) -> None:
        """A sweep starts; without a coefficient no part has an effect."""
        self._effects.append(torch.zeros(len(self.names), dtype=torch.float64))
        self._sums.append(torch.zeros((), dtype=torch.float64))

    def take(self, coefficient: Tensor) -> None:
        """The coefficient in this sweep."""
        rows = self._rows(coefficient)
        relevance = relevance_of(self._added.double(), rows.double()).sum(-1, keepdim=True)
        self._effects[-1] = self._by_part(relevance).flatten()
        if self._baseline == "mean":
            self._sums[-1] = self._by_part(rows)

    def effects(self) -> Tensor:
        """``<b - b0, M>`` of every sweep, float64 ``[sweeps, parts]``."""
        effects = torch.stack(self._effects)
        if self._baseline == "zero" or self._total is None or self._tokens is None:
            return effects
        mean = self._total / self._tokens.clamp_min(1)
        return effects - torch.stack([(sums * mean).sum(-1).flatten() for sums in self._sums])

    def _rows(self, value: Tensor) -> Tensor:
        """``[tokens, parts, entries]``."""
        rows = value.movedim(self._axis, -1)
        if self._cut is None:
            return rows.reshape(-1, 1, rows.shape[-1])
        if self._cut.kind in ("head", "head-group"):
            # Heads lie in front of tokens: [batch, sequence, width, heads] -> rows by token.
            rows = rows.movedim(-1, -2)
            return rows.reshape(rows[..., 0, 0].numel(), self._cut.count, -1)
        if self._cut.kind == "expert":
            return rows.reshape(-1, 1, rows.shape[-1])
        return rows.reshape(-1, rows.shape[-1], 1)

    def _see_rows(self, sweeps: Sweeps, count: int) -> None:
        """Which rows count, and whose they are."""
        shown = None if self._mask is None else sweeps.value(self._mask).bool().flatten()
        self._shown, self._owner = shown, None
        experts = None if self._cut is None else self._cut.experts
        if experts is None:
            return
        places = torch.arange(count)
        offsets = sweeps.value(experts.offsets.name).to(torch.int64)
        self._owner = torch.searchsorted(offsets, places, right=True)
        if shown is not None:
            tokens = None if experts.tokens is None else sweeps.value(experts.tokens.name)
            self._shown = None if tokens is None else shown[tokens]

    def _by_part(self, rows: Tensor) -> Tensor:
        """The float64 sum over rows, ``[parts, entries]``, or ``[experts, parts, entries]``."""
        owner = self._owner
        if self._shown is not None:
            rows = rows[self._shown]
            owner = None if owner is None else owner[self._shown]
        rows = rows.double()
        experts = None if self._cut is None else self._cut.experts
        if experts is None or owner is None:
            return rows.sum(0)
        # Rows past the last expert belong to nobody.
        whole = rows.new_zeros(experts.count + 1, *rows.shape[1:])
        return whole.index_add(0, owner, rows)[:-1]


def watch_stream(
    graph: Graph, parts: Sequence[Block | Sublayer], baseline: Baseline
) -> list[Watched]:
    """Blocks or branches: each adds its exit minus its entry, a norm behind the sum included.

    Where several branches have one exit, each adds what it computes.
    """
    exits = Counter(part.exit for part in parts)
    found: list[Watched] = []
    for part in parts:
        values: tuple[str, ...] = (part.exit.name, part.entry.name)
        if isinstance(part, Sublayer) and exits[part.exit] > 1:
            values = (part.branch.name,)
        axis = 1 if _holds_images(part.entry, part.nodes) else -1
        mask, names = _mask_of(graph, part.exit), [part.name]
        found.append(
            Watched(part.exit.name, values, names, mask=mask, baseline=baseline, axis=axis)
        )
    return found


def watch_parts(graph: Graph, parts: Parts, baseline: Baseline) -> Watched:
    """Heads, experts or channels: each adds its slice of the value."""
    name, count = parts.node.name, parts.count
    if parts.experts is not None and parts.kind == "channel":
        count *= parts.experts.count
    mask = None if parts.branch is None else _mask_of(graph, parts.branch.entry)
    names = [str(index) for index in range(count)]
    return Watched(name, (name,), names, mask=mask, baseline=baseline, axis=parts.axis, cut=parts)


def watch_samples(
    graph: Graph, samples: Samples, preset: Preset, watched: Sequence[Watched], draws: Draws
) -> None:
    """Run the samples, one sequence at a time, and let everything that is watched see them.

    Args:
        graph: Of the model.
        samples: What runs.
        preset: The rules.
        watched: What looks at values and takes coefficients.
        draws: Where relevance starts.
    """
    target = loss_target(graph)
    by_node: dict[str, list[Watched]] = {}
    for one in watched:
        by_node.setdefault(one.coefficient, []).append(one)
    sweeps = Sweeps(graph, preset, target, by_node, [n for one in watched for n in one.reads])

    def seen(name: str, coefficient: Tensor) -> None:
        for one in by_node[name]:
            one.take(coefficient)

    for tokens, seed in all_seeds(samples, sweeps, target, draws):
        for one in watched:
            if tokens is not None:
                one.look(sweeps)
            one.begin()
        sweeps.backward(seed, seen)


def _mask_of(graph: Graph, node: Node) -> str | None:
    mask = token_mask(graph, node)
    return None if mask is None else mask.name


def _holds_images(value: Node, nodes: Iterable[Node]) -> bool:
    """Whether the channels of a stream are in front: ``[batch, channels, height, width]``."""
    convolves = any(node.target is aten.conv2d.default for node in nodes)
    return convolves and value.meta["val"].ndim == 4
